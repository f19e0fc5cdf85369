"""The released models, and what a weight table says about names and shapes."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loongforge.core.model.weights import (
    Copy,
    FuseDelta,
    FuseGateUp,
    FuseQKV,
    Rule,
    SplitDelta,
    SplitQKV,
    StackedExperts,
    WeightTable,
)

sys.path.insert(0, str(Path(__file__).parent))  # for `released`


@pytest.fixture
def released() -> Mapping[str, dict[str, Any]]:
    """Our name of a size to the released `config.json`."""
    from released import FAMILIES

    return {size: config for family in FAMILIES.values() for size, config in family.configs.items()}


@pytest.fixture
def parameters() -> Mapping[str, int]:
    """Our name of a size to the parameters of the released model."""
    from released import FAMILIES

    return {size: count for family in FAMILIES.values() for size, count in family.parameters.items()}


class TableReader:
    """Which rule of a table claims a tensor, and what it expects of the shape."""

    def __init__(self, table: WeightTable) -> None:
        self.table = table

    def claims(self, name: str) -> list[Rule]:
        """Rules with this Hugging Face name, those of fused norms and of a tied head once more left out."""
        found = [rule for rule in self.table.rules if any(_fits(hf, name) for hf in hf_names(rule))]
        return [rule for rule in found if "layer_norm_weight" not in rule.megatron and rule.megatron != HEAD] or found

    def idle(self, names: list[str]) -> list[str]:
        """Parameters whose rule finds none of these tensors."""
        return [
            rule.megatron
            for rule in self.table.rules
            if not any(_fits(hf, name) for hf in hf_names(rule) for name in names)
        ]

    def ignores(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.table.ignored_hf)


HEAD = "output_layer.weight"


@pytest.fixture
def reader() -> type[TableReader]:
    return TableReader


def hf_names(rule: Rule) -> tuple[str, ...]:
    match rule:
        case Copy() | StackedExperts() | SplitQKV() | SplitDelta():
            return (rule.hf,)
        case FuseQKV():
            return (rule.q, rule.k, rule.v)
        case FuseGateUp():
            return (rule.gate, rule.up)
        case FuseDelta():
            return (rule.qkvz, rule.ba)


def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch(re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(pattern)), name) is not None
