"""Hugging Face tensors of GLM-4.5 and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import WeightTable
from loongforge.models.glm4_moe.config import Glm4MoeConfig
from loongforge.models.parts.decoder_weights import experts, gated_mlp, grouped_attention, mlp_norm, router, table
from loongforge.models.parts.prediction_weights import AsLayers


def weights(config: Glm4MoeConfig) -> WeightTable:
    """The two-way table; the bias of the experts' choice is a buffer on both sides."""
    geometry = config.geometry()
    attention, dense = (*grouped_attention(geometry), *mlp_norm()), gated_mlp()
    sparse = (
        *router(bias=True),
        *experts("per_expert"),
        *(gated_mlp("shared_experts.") if config.moe_shared_expert_intermediate_size else ()),
    )
    last = dense if config.first_dense_layers == config.num_layers else sparse
    further = AsLayers(config.num_layers, config.mtp_num_layers, (*attention, *last))
    return table(
        geometry,
        *attention,
        *(dense if config.first_dense_layers else ()),
        *sparse,
        *further.rules(),
        **further.around(),
    )
