"""Megatron's flags that are refused, each by name, with the reason and what to do instead (`flags_refused.toml`)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The reason shared by a group of flags, and the remedy."""

    because: str
    remedy: str


@cache
def refused() -> Mapping[str, Refusal]:
    """Every refused flag by name, without its leading dashes."""
    table = tomllib.loads(files(__package__).joinpath("flags_refused.toml").read_text(encoding="utf-8"))
    return {
        name: Refusal(because=group["because"], remedy=group["remedy"])
        for group in table["refusal"]
        for name in group["flags"].split()
    }
