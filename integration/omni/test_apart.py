"""An encoder on ranks of its own gives the one-process run: loss, every gradient, and the weights after steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from omni_run import OneProcess, config_of, gradients, steps, worst

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


def check(
    flags: list[str], world: int, mix: str, vlm: dict[str, Path], one_process: OneProcess, out: Path,
    *, mbs: int = 1, gbs: int = 4,
) -> None:  # fmt: skip
    expected = one_process.gradients(mix, gbs=gbs)
    mine = gradients(config_of(vlm[FAMILY], flags, mbs=mbs, gbs=gbs), world, mix, out)
    assert mine.tokens == expected.tokens
    assert mine.loss == pytest.approx(expected.loss, rel=1e-6)
    difference, name = worst(mine.tensors, expected.tensors)
    assert difference < TOLERANCE, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unequal_images(layout: str, vlm: dict[str, Path], one_process: OneProcess, tmp_path: Path) -> None:
    flags, world = LAYOUTS[layout]
    check(flags, world, "mixed", vlm, one_process, tmp_path)


@pytest.mark.parametrize(
    ("layout", "mix", "sequences"),
    [
        ("tp 2, sequence parallel", "no image", 4),  # the bridge carries a row that nobody uses
        ("two stages", "no image", 4),
        ("encoder tp 2", "one huge", 4),
        ("two stages", "mixed", 3),  # micro-batches that the stages do not divide
    ],
)
def test_other_mixes(
    layout: str, mix: str, sequences: int, vlm: dict[str, Path], one_process: OneProcess, tmp_path: Path
) -> None:
    flags, world = LAYOUTS[layout]
    check(flags, world, mix, vlm, one_process, tmp_path, gbs=sequences)


def test_larger_micro_batches(vlm: dict[str, Path], one_process: OneProcess, tmp_path: Path) -> None:
    """Features of several sequences, which lie between each other in the hidden states."""
    flags, world = LAYOUTS["tp 2, sequence parallel"]
    check(flags, world, "mixed", vlm, one_process, tmp_path, mbs=2)


EXPERTS = ["--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]


def test_experts(vlm: dict[str, Path], one_process: OneProcess, tmp_path: Path) -> None:
    """Two replicas share the experts; megatron-core's globals know no group of experts in this place."""
    expected = one_process.gradients("mixed", "qwen3_vl_moe")
    mine = gradients(config_of(vlm["qwen3_vl_moe"], apart(2) + EXPERTS), 4, "mixed", tmp_path)
    assert mine.loss == pytest.approx(expected.loss, rel=1e-6)
    difference, name = worst(mine.tensors, expected.tensors)
    assert difference < TOLERANCE, name


def test_recomputed(vlm: dict[str, Path], one_process: OneProcess, tmp_path: Path) -> None:
    full = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    encoder = [f"+model.image_encoder.{flag[2:]}={value}" for flag, value in zip(full[::2], full[1::2], strict=True)]
    check(apart(1) + full + encoder, 2, "mixed", vlm, one_process, tmp_path)


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
def test_weights_after_steps(layout: str, vlm: dict[str, Path], one_process: OneProcess, tmp_path: Path) -> None:
    """The same learning rate, the same gradient norm over both sides, the same weights."""
    flags, world, family, more = SPREAD[layout]
    results, weights = one_process.steps(OPTIMIZER + more, STEPS, family)
    found, mine = steps(config_of(vlm[family], OPTIMIZER + more + flags), world, STEPS, tmp_path)
    for ours, theirs in zip(found, results, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert ours.extra == pytest.approx(theirs.extra, rel=1e-5), "how evenly experts are used"
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-6)
        assert ours.lr == theirs.lr
    difference, name = worst(mine, weights)
    assert difference < TOLERANCE, name
