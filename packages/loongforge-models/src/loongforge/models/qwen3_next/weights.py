"""Hugging Face tensors of Qwen3-Next and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import WeightTable
from loongforge.models.parts.decoder_weights import (
    experts,
    gated_shared_expert,
    grouped_attention,
    mlp_norm,
    router,
    table,
)
from loongforge.models.parts.delta_weights import delta_rule
from loongforge.models.qwen3_next.config import Qwen3NextConfig


def weights(config: Qwen3NextConfig) -> WeightTable:
    """The two-way table; a layer has the tensors of the one or the other kind of attention."""
    geometry = config.geometry()
    return table(
        geometry,
        *grouped_attention(geometry),
        *delta_rule(geometry),
        *mlp_norm(),
        *router(),
        *experts("per_expert"),
        *gated_shared_expert(),
        # Multi-token prediction. It is not trained here, so it is not loaded either.
        ignored=(r"mtp\..*",),
    )
