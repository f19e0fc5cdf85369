"""The released models: contents of every `config.json` and every parameter count, one file for each family.

A file is named like its family and has

- `RELEASED`: our name of the size to the released `config.json`, without the keys of `WRITER`;
- `PARAMETERS`: the size to the parameters of the released model, multi-token prediction and the biases that a router's
  load balancing moves left out, as `AutoModelForCausalLM` counts them;
- optional `EXPECTED`: keys to what we write where the release has another value, which has no effect;
- optional `FREE`: more keys of the releases that we neither need nor write;
- optional `TRANSFORMERS = False`: transformers has no class for these models.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

WRITER = {"torch_dtype": "bfloat16", "transformers_version": "4.51.0"}
"""Keys of a release that say nothing about the model."""


@dataclass(frozen=True, kw_only=True)
class Released:
    """What one file of this folder says."""

    configs: Mapping[str, dict[str, Any]]
    parameters: Mapping[str, int]
    expected: Mapping[str, Any]
    free: frozenset[str]
    transformers: bool


def _read(family: str) -> Released:
    file = import_module(f"{__name__}.{family}")
    return Released(
        configs={size: {**WRITER, **values} for size, values in file.RELEASED.items()},
        parameters=file.PARAMETERS,
        expected=getattr(file, "EXPECTED", {}),
        free=frozenset(getattr(file, "FREE", ())) | WRITER.keys(),
        transformers=getattr(file, "TRANSFORMERS", True),
    )


FAMILIES: dict[str, Released] = {
    family: _read(family) for family in sorted(module.name for module in pkgutil.iter_modules(__path__))
}
SIZES: list[tuple[str, str]] = [(family, size) for family, one in FAMILIES.items() for size in one.configs]
"""Every family with each of its sizes."""
