"""The first layers of a foundation add further levels of an encoder's features (DeepStack, Meng et al., 2024).

The levels travel through the `context` that megatron-core's layers pass on for cross-attention: the block hands it to
every layer, and full recomputation saves it and returns its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from loongforge.core.megatron.visual import add
from loongforge.core.model.contract import Visual


def levels_context(visual: Visual | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Arguments of `TransformerBlock` that carry the levels above the first; none where there is nothing to add."""
    if visual is None or visual.rows.size(1) == 1 or visual.positions.numel() == 0:
        return {}
    return {"context": visual.rows[:, 1:].flatten(1).to(dtype), "context_mask": visual.positions}


class DeepstackLayer(TransformerLayer):
    """A layer that adds its level after itself; the layer's number chooses the level.

    `context` `[n, levels * H]` and `context_mask` int64 `[n]` come from `levels_context`. The last level's layer ends
    the context, so that later layers carry nothing.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states `[S, B, H]` to the same, and the context for the next layer."""
        output, _ = super().forward(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
        hidden: Any = output  # a list in CUDA graph capture alone
        if context is None:
            return hidden, None
        assert context_mask is not None, "levels come with their positions"
        levels = context.view(context.size(0), -1, hidden.size(-1))
        level = self.layer_number - 1
        assert level < levels.size(1), f"layer {self.layer_number} has no level among {levels.size(1)}"
        hidden = add(hidden, levels[:, level], context_mask)
        return hidden, context if level + 1 < levels.size(1) else None
