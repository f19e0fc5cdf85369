"""How layers without an indexer get the keys that the layer before them attended to (GLM-5.2).

The selection travels beside the hidden states, as the `context` that megatron-core's layers pass on: an argument and a
result of every layer, nothing that outlives its call. A micro-batch therefore never meets the selection of another one,
however the pipeline orders them, and whatever recomputes a layer (all of it, a group of layers, core attention alone)
saved its selection with its other inputs: the layer that chose runs again later, or in another group. megatron-core
0.19 keeps it on an object instead (`DSAttention._get_index_share_carrier`), without packing and mask the configuration
that all micro-batches have: what is recomputed would find there what the latest micro-batch chose.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from loongforge.core.megatron.latent_attention import LatentAttention


class SharingLayer(TransformerLayer):
    """A layer that takes a selection from the one before it, hands one on, or both.

    `context` is what `SparseAttention.telling` tells: int32 `[B, S, K]`, or None where all earlier tokens are chosen.
    """

    def __init__(self, *args: Any, hands_on: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hands_on = hands_on

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states `[S, B, H]` to the same, and the context for the next layer."""
        attention: Any = self.self_attention
        assert isinstance(attention, LatentAttention), "layers that share a selection have latent attention"
        with attention.core_attention.telling() as told:
            output, _ = super().forward(hidden_states=hidden_states, attention_mask=context, **kwargs)
        hidden: Any = output  # a list in CUDA graph capture alone
        return hidden, told[0] if self.hands_on else None
