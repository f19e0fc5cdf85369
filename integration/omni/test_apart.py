"""An encoder on ranks of its own gives the one-process run: loss, every gradient, and the weights after steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omni_run import Measured, config_of, gradients, steps, worst

FAMILY = "qwen3_vl"

TP2 = ["--tensor-model-parallel-size", "2"]
SP = ["--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
ZERO1 = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


def apart(ranks: int) -> list[str]:
    return ["--encoder-ranks", str(ranks)]


LAYOUTS = {
    "one foundation rank": (apart(1), 2),
    "tp 2": (apart(1) + TP2, 3),
    "tp 2, sequence parallel": (apart(1) + TP2 + SP, 3),
    "two stages": (apart(1) + PP2, 3),
    "encoder tp 2": (apart(2), 3),
    "two replicas": (apart(2), 4),
}
TOLERANCE = 1e-5
"""Relative to a tensor's largest entry, fp32."""


@pytest.fixture(scope="module")
def plain(megatron: Any, vlm: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process computes, by mix, once."""
    kept: dict[str, Measured] = {}

    def of(mix: str) -> Measured:
        if mix not in kept:
            kept[mix] = gradients(config_of(vlm[FAMILY], []), 1, mix, tmp_path_factory.mktemp("plain"))
        return kept[mix]

    return of


def check(flags: list[str], world: int, mix: str, vlm: dict[str, Path], plain: Any, out: Path, **shape: int) -> None:
    expected = plain(mix)
    mine = gradients(config_of(vlm[FAMILY], flags, **shape), world, mix, out)
    assert mine.tokens == expected.tokens
    assert mine.loss == pytest.approx(expected.loss, rel=1e-6)
    difference, name = worst(mine.tensors, expected.tensors)
    assert difference < TOLERANCE, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unequal_images(layout: str, vlm: dict[str, Path], plain: Any, tmp_path: Path) -> None:
    flags, world = LAYOUTS[layout]
    check(flags, world, "mixed", vlm, plain, tmp_path)


@pytest.mark.parametrize("layout", ["tp 2, sequence parallel", "two stages"])
def test_without_an_image(layout: str, vlm: dict[str, Path], plain: Any, tmp_path: Path) -> None:
    """The bridge carries a row that nobody uses, and the encoder's gradients are zero."""
    flags, world = LAYOUTS[layout]
    check(flags, world, "no image", vlm, plain, tmp_path)


def test_larger_micro_batches(vlm: dict[str, Path], plain: Any, tmp_path: Path) -> None:
    """Features of several sequences, which lie between each other in the hidden states."""
    flags, world = LAYOUTS["tp 2, sequence parallel"]
    check(flags, world, "mixed", vlm, plain, tmp_path, mbs=2)


EXPERTS = ["--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]


def test_experts(megatron: Any, vlm: dict[str, Path], tmp_path: Path) -> None:
    """Two replicas share the experts; megatron-core's globals know no group of experts in this place."""
    expected = gradients(config_of(vlm["qwen3_vl_moe"], []), 1, "mixed", tmp_path / "plain")
    mine = gradients(config_of(vlm["qwen3_vl_moe"], apart(2) + EXPERTS), 4, "mixed", tmp_path / "spread")
    assert mine.loss == pytest.approx(expected.loss, rel=1e-6)
    difference, name = worst(mine.tensors, expected.tensors)
    assert difference < TOLERANCE, name


def test_recomputed(vlm: dict[str, Path], plain: Any, tmp_path: Path) -> None:
    full = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    encoder = [f"+model.image_encoder.{flag[2:]}={value}" for flag, value in zip(full[::2], full[1::2], strict=True)]
    check(apart(1) + full + encoder, 2, "mixed", vlm, plain, tmp_path)


OPTIMIZER = [
    *("--lr", "1e-3", "--min-lr", "1e-3", "--weight-decay", "0.1", "--clip-grad", "0.5"),
    *("--adam-eps", "1e-5"),  # else the first steps divide rounding by rounding
]
STEPS = ["mixed", "no image", "everywhere"]
BALANCED = ["model.foundation.moe_aux_loss_coeff=0.02"]
SPREAD = {
    "tp 2, sequence parallel": (*LAYOUTS["tp 2, sequence parallel"], FAMILY, []),
    "two stages": (*LAYOUTS["two stages"], FAMILY, []),
    "two replicas, sharded and overlapped": (apart(2) + ZERO1, 4, FAMILY, []),
    "experts over tp 2": (apart(1) + TP2 + SP + EXPERTS, 3, "qwen3_vl_moe", BALANCED),
}


@pytest.mark.parametrize("layout", SPREAD)
def test_weights_after_steps(layout: str, megatron: Any, vlm: dict[str, Path], tmp_path: Path) -> None:
    """The same learning rate, the same gradient norm over both sides, the same weights."""
    flags, world, family, more = SPREAD[layout]
    results, weights = steps(config_of(vlm[family], OPTIMIZER + more), 1, STEPS, tmp_path / "plain")
    found, mine = steps(config_of(vlm[family], OPTIMIZER + more + flags), world, STEPS, tmp_path / "spread")
    for ours, theirs in zip(found, results, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert ours.extra == pytest.approx(theirs.extra, rel=1e-5), "how evenly experts are used"
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-6)
        assert ours.lr == theirs.lr
    difference, name = worst(mine, weights)
    assert difference < TOLERANCE, name
