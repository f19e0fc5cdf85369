"""Hugging Face tensors of Qwen3-Next and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import Rule, WeightTable
from loongforge.models.parts.decoder_weights import (
    experts,
    gated_shared_expert,
    grouped_attention,
    mlp_norm,
    router,
    table,
)
from loongforge.models.parts.delta_weights import delta_rule
from loongforge.models.parts.prediction_weights import block, ends, left_out
from loongforge.models.qwen3_next.config import Qwen3NextConfig


def weights(config: Qwen3NextConfig) -> WeightTable:
    """The two-way table; a layer has the tensors of the one or the other kind of attention."""
    geometry = config.geometry()
    attention = grouped_attention(geometry)
    inner = (*mlp_norm(), *router(), *experts("per_expert"), *gated_shared_expert())
    return table(
        geometry,
        *attention,
        *delta_rule(geometry),
        *inner,
        *(_further((*attention, *inner)) if config.mtp_num_layers else ()),
        left_out=() if config.mtp_num_layers else left_out(r"mtp\..*", 0),
    )


def _further(layer: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The one further layer, which has attention."""
    around = ends(
        0,
        embedding_norm="mtp.pre_fc_norm_embedding.weight",
        hidden_norm="mtp.pre_fc_norm_hidden.weight",
        projection="mtp.fc.weight",
        last_norm="mtp.norm.weight",
    )
    return (*around, *block(0, layer, "mtp.layers.0."))
