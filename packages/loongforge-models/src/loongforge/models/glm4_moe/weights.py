"""Hugging Face tensors of GLM-4.5 and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import WeightTable
from loongforge.models.glm4_moe.config import Glm4MoeConfig
from loongforge.models.parts.decoder_weights import experts, gated_mlp, grouped_attention, mlp_norm, router, table


def weights(config: Glm4MoeConfig) -> WeightTable:
    """The two-way table; the bias of the experts' choice is a buffer on both sides."""
    geometry = config.geometry()
    return table(
        geometry,
        *grouped_attention(geometry),
        *mlp_norm(),
        *(gated_mlp() if config.first_dense_layers else ()),
        *router(bias=True),
        *experts("per_expert"),
        *(gated_mlp("shared_experts.") if config.moe_shared_expert_intermediate_size else ()),
        # Multi-token prediction is stored as one more layer. It is not trained here, so it is not loaded either.
        ignored=(rf"model\.layers\.{config.num_layers}\..*",),
    )
