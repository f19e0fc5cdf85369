"""What `quantization_config` of a `config.json` says, where weights can be read all the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loongforge.core.errors import ConfigError

MEANINGLESS = ("activation_scheme", "ignored_layers", "modules_to_not_convert", "scale_fmt")
"""Keys without meaning here: how activations are quantised, and what the tensors and their scales say themselves."""

E4M3 = ("e4m3", "float8_e4m3fn")
"""Spellings of the one form, DeepSeek's and MiniMax's."""


def fp8_block(quantization: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale in an fp8 checkpoint (DeepSeek-V3, 2024, 3.3); None: not quantised.

    `ConfigError` for every other kind of quantisation.
    """
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        raise ConfigError(f"config.json: quantization_config must be an object, got {quantization!r}.")
    said: dict[str, Any] = {str(key): value for key, value in quantization.items()}
    method, form = said.pop("quant_method", None), said.pop("fmt", "e4m3")
    block = said.pop("weight_block_size", None)
    if method != "fp8":
        raise ConfigError(_refused(f"quant_method={method!r}"))
    if form not in E4M3:
        raise ConfigError(_refused(f"fmt={form!r}"))
    if not _is_block(block):
        raise ConfigError(_refused(f"weight_block_size={block!r}"))
    if unknown := sorted(said.keys() - set(MEANINGLESS)):
        raise ConfigError(_refused(f"{unknown[0]}={said[unknown[0]]!r}"))
    return block[0], block[1]


def _is_block(block: Any) -> bool:
    return isinstance(block, list | tuple) and len(block) == 2 and all(type(one) is int and one > 0 for one in block)


def _refused(what: str) -> str:
    return (
        f"config.json: quantization_config with {what} is not supported, only quant_method='fp8', fmt='e4m3' and a "
        "weight_block_size of two numbers, as in DeepSeek-V3: load the original checkpoint, or convert it to bfloat16 "
        "with the tool that quantised it."
    )
