"""Hugging Face tensors of a Qwen3 with experts and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import WeightTable
from loongforge.models.parts.decoder_weights import experts, grouped_attention, mlp_norm, router, table
from loongforge.models.qwen3_moe.config import Qwen3MoeConfig


def weights(config: Qwen3MoeConfig) -> WeightTable:
    """The two-way table; the experts as `expert_layout` says."""
    geometry = config.geometry()
    return table(geometry, *grouped_attention(geometry), *mlp_norm(), *router(), *experts(config.expert_layout))
