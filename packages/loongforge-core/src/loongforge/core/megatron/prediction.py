"""Multi-token prediction: further layers behind the decoder that each predict one more token ahead.

megatron-core's block and layers (DeepSeek-V3, 2024, section 2.2). What each depth sees and predicts comes from the
batch, cut out of whole rows before context parallelism splits them: upstream moves tokens and labels from rank to rank
in every forward pass and then takes the mean over one rank's tokens, which is another loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from loongforge.core.megatron.specs import layer_spec
from loongforge.core.model.contract import BuildContext
from loongforge.core.model.geometry import TransformerGeometry


class PredictionLayer(MultiTokenPredictionLayer):
    """megatron-core's layer, with the tokens of all depths given to it in place of those of the depth before."""

    def _get_embeddings(
        self,
        input_ids: torch.Tensor,
        position_ids: Any,
        embedding: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        packed_seq_params: Any = None,
        padding_mask: Any = None,
    ) -> tuple[torch.Tensor, Any, Any, torch.Tensor, torch.Tensor]:
        """`input_ids` int64 `[D, B, S]`; the embeddings of this depth's, `[S, B, H]`, and what goes on as it came."""
        embedded = embedding(input_ids=input_ids[self.layer_number - 1], position_ids=position_ids)
        if not hidden_states.requires_grad and torch.is_grad_enabled():
            # Behind a frozen decoder: recomputation records no graph when none of its inputs needs a gradient.
            hidden_states = hidden_states.detach().requires_grad_()
        return input_ids, position_ids, padding_mask, embedded, hidden_states


def prediction_block(geometry: TransformerGeometry, context: BuildContext) -> MultiTokenPredictionBlock:
    """The further layers: each two norms, a projection of both inputs, a layer like the decoder's last, a norm."""
    layers, experts = context.layers, geometry.experts
    inner = layer_spec(
        context.config, layers, geometry,
        experts=experts is not None and experts.first_dense_layers < geometry.num_layers,
    )  # fmt: skip
    spec = ModuleSpec(
        module=PredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=layers.norm,
            hnorm=layers.norm,
            eh_proj=layers.column_linear,
            mtp_model_layer=inner,
            layer_norm=layers.norm,
        ),
    )
    block: Any = MultiTokenPredictionBlockSubmodules(layer_specs=[spec] * geometry.prediction_layers)
    return MultiTokenPredictionBlock(
        config=context.config, spec=block, vp_stage=context.vp_stage, pg_collection=context.groups
    )
