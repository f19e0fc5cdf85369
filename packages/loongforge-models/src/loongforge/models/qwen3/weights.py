"""Hugging Face tensors of dense Qwen3 and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import WeightTable
from loongforge.models.parts.decoder_weights import gated_mlp, grouped_attention, mlp_norm, table
from loongforge.models.qwen3.config import Qwen3Config


def weights(config: Qwen3Config) -> WeightTable:
    """The two-way table."""
    geometry = config.geometry()
    return table(geometry, *grouped_attention(geometry), *mlp_norm(), *gated_mlp())
