"""Rules that the configurations of encoders and projectors share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loongforge.core.errors import ConfigError
from loongforge.models.parts.hf_config import HFKeys


def wrong_heads(family: str, hidden_size: int, num_attention_heads: int) -> list[str]:
    """A sentence when heads do not divide the width into parts that a rotation by row and column fits."""
    if hidden_size % num_attention_heads:
        return [
            f"{family}: hidden_size={hidden_size!r} must be a multiple of num_attention_heads={num_attention_heads!r}."
        ]
    if hidden_size // num_attention_heads % 4:
        return [
            f"{family}: hidden_size / num_attention_heads is {hidden_size // num_attention_heads}, not a multiple "
            "of 4; half of a head's channels turn by row and half by column, in pairs."
        ]
    return []


def wrong_layers(family: str, name: str, layers: Sequence[Any], num_layers: int) -> list[str]:
    """A sentence when a list of layers is not ascending or names one that is not there."""
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers)
    if whole and list(layers) == sorted({*layers}) and all(0 <= layer < num_layers for layer in layers):
        return []
    return [f"{family}: {name} must be ascending layers from 0 to {num_layers - 1}, got {list(layers)!r}."]


def read_vision_config(keys: HFKeys, model_types: Sequence[str], hf: Mapping[str, Any]) -> dict[str, Any]:
    """Values by our field name of a `vision_config`, lists as tuples; `ConfigError` with every problem.

    The section calls itself by the name of the whole model in some releases, by its own in others: `model_types`.
    """
    values, problems = keys.read({key: value for key, value in hf.items() if key != "model_type"})
    kind = hf.get("model_type")
    if kind is not None and kind not in model_types:
        problems.append(f"config.json: vision_config.model_type {kind!r} is none of {', '.join(model_types)}.")
    if problems:
        raise ConfigError(*problems)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
