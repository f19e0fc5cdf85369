"""Hugging Face tensors of DeepSeek-V3 and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import WeightTable
from loongforge.models.deepseek3.config import DeepSeek3Config
from loongforge.models.parts.decoder_weights import experts, gated_mlp, latent_attention, mlp_norm, router, table


def weights(config: DeepSeek3Config) -> WeightTable:
    """The two-way table; the bias of the experts' choice is a buffer on both sides."""
    geometry = config.geometry()
    return table(
        geometry,
        *latent_attention(geometry),
        *mlp_norm(),
        *(gated_mlp() if config.first_dense_layers else ()),
        *router(bias=True),
        *experts("per_expert"),
        *(gated_mlp("shared_experts.") if config.moe_shared_expert_intermediate_size else ()),
        ignored=(
            # Multi-token prediction is stored as one more layer. It is not trained here, so it is not loaded either.
            rf"model\.layers\.{config.num_layers}\..*",
            # The rotary table of early exports, which the config gives.
            r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        ),
    )
