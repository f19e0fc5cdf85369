"""Hugging Face tensors of DeepSeek-V2 and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import WeightTable
from loongforge.models.deepseek2.config import DeepSeek2Config
from loongforge.models.parts.decoder_weights import experts, gated_mlp, latent_attention, mlp_norm, router, table


def weights(config: DeepSeek2Config) -> WeightTable:
    """The two-way table."""
    geometry = config.geometry()
    return table(
        geometry,
        *latent_attention(geometry),
        *mlp_norm(),
        *(gated_mlp() if config.first_dense_layers else ()),
        *router(),
        *experts("per_expert"),
        *(gated_mlp("shared_experts.") if config.moe_shared_expert_intermediate_size else ()),
    )
