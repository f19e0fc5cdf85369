"""Hugging Face tensors of Qwen2.5 and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import WeightTable
from loongforge.models.parts.decoder_weights import gated_mlp, grouped_attention, mlp_norm, table
from loongforge.models.qwen2.config import Qwen2Config


def weights(config: Qwen2Config) -> WeightTable:
    """The two-way table."""
    geometry = config.geometry()
    # Early exports stored the rotary table, which the config gives.
    rotary = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    return table(geometry, *grouped_attention(geometry), *mlp_norm(), *gated_mlp(), ignored=rotary)
