"""Hugging Face tensors of MiMo and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import Rule, WeightTable
from loongforge.models.mimo.config import MiMoConfig
from loongforge.models.parts.decoder_weights import gated_mlp, grouped_attention, mlp_norm, table
from loongforge.models.parts.prediction_weights import MOST, block, ends, left_out


def weights(config: MiMoConfig) -> WeightTable:
    """The two-way table."""
    geometry, count = config.geometry(), config.mtp_num_layers
    layer = (*grouped_attention(geometry), *mlp_norm(), *gated_mlp())
    further = [rule for depth in range(count) for rule in _further(depth, layer)]
    beyond = "|".join(str(count + number) for number in range(MOST))
    return table(geometry, *layer, *further, left_out=left_out(rf"model\.mtp_layers\.({beyond})\..*", count))


def _further(depth: int, layer: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """One further layer. Its projection has the hidden state's columns first, where others have the embedding's."""
    theirs = f"model.mtp_layers.{depth}."
    around = ends(
        depth,
        embedding_norm=theirs + "token_layernorm.weight",
        hidden_norm=theirs + "hidden_layernorm.weight",
        projection=theirs + "input_proj.weight",
        last_norm=theirs + "final_layernorm.weight",
        hidden_first=True,
    )
    return (*around, *block(depth, layer, theirs))
