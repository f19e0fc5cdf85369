"""Released vision-language families against transformers: loss and every gradient, images, several images, video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omni_run import Measured, config_of, gradients, logits, transformers_alone, worst
from tiny_vlm import MAKERS

TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]

TOLERANCE = 2e-5
"""Relative to a tensor's largest entry, fp32."""


@pytest.fixture(scope="module")
def expected(vlm: dict[str, Path]) -> Any:
    """What transformers computes, by family and mix, once."""
    kept: dict[tuple[str, str], Measured] = {}

    def of(family: str, mix: str) -> Measured:
        if (family, mix) not in kept:
            kept[family, mix] = transformers_alone(vlm[family], mix)
        return kept[family, mix]

    return of


def check(family: str, flags: list[str], world: int, mix: str, vlm: dict[str, Path], expected: Any, out: Path) -> None:
    theirs = expected(family, mix)
    mine = gradients(config_of(vlm[family], flags), world, mix, out)
    assert mine.tokens == theirs.tokens
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)
    difference, name = worst(mine.tensors, theirs.tensors)
    assert difference < TOLERANCE, name


@pytest.mark.parametrize(
    ("family", "mix"),
    [*((family, "mixed") for family in MAKERS), ("qwen2_5_vl", "one huge"), ("qwen3_vl", "one huge")],
)
def test_one_process(family: str, mix: str, megatron: Any, vlm: dict[str, Path], expected: Any, tmp_path: Path) -> None:
    check(family, [], 1, mix, vlm, expected, tmp_path)


@pytest.mark.parametrize("family", MAKERS)
def test_logits(family: str, megatron: Any, vlm: dict[str, Path], expected: Any) -> None:
    mine = logits(config_of(vlm[family], []), "mixed")
    for ours, theirs in zip(mine, expected(family, "mixed").logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max()))


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_layouts(family: str, layout: str, megatron: Any, vlm: dict[str, Path], expected: Any, tmp_path: Path) -> None:
    check(family, {"tp2": TP2, "pp2": PP2}[layout], 2, "mixed", vlm, expected, tmp_path)


def test_experts_apart(megatron: Any, vlm: dict[str, Path], expected: Any, tmp_path: Path) -> None:
    check("qwen3_vl_moe", EP2, 2, "mixed", vlm, expected, tmp_path)
