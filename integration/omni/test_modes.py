"""Every place an encoder can run gives the one-process run: loss, every gradient, and the weights after steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from omni_run import OneProcess, config_of, gradients, steps, worst

FAMILY = "qwen3_vl"

TP2 = ["--tensor-model-parallel-size", "2"]
SP = ["--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
ZERO1 = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
ENCODER_FULL = [
    "+model.image_encoder.recompute-granularity=full", "+model.image_encoder.recompute-method=uniform",
    "+model.image_encoder.recompute-num-layers=1",
]  # fmt: skip
ENCODER_TP1 = ["+model.image_encoder.tensor-model-parallel-size=1"]
ENCODER_TP2 = ["+model.image_encoder.tensor-model-parallel-size=2"]
OVER_TP = ["--enable-encoder-hetero-dp"]
AHEAD = ["--enable-full-hetero-dp"]
OFFLOAD = ["--full-hetero-dp-cpu-offload"]

LAYOUTS = {
    "same tp": (TP2, 2),
    "same tp, sequence parallel": (TP2 + SP, 2),
    "smaller encoder tp": (TP2 + ENCODER_TP1, 2),
    "larger encoder tp": (ENCODER_TP2, 2),
    "data parallel over tp": (TP2 + SP + OVER_TP, 2),
    "data parallel over tp x cp": (TP2 + SP + CP2 + OVER_TP, 4),
    "context parallel": (CP2, 2),
    "first stage": (PP2, 2),
    "data parallel": (["--overlap-grad-reduce"], 2),
    "recompute": (FULL + ENCODER_FULL, 1),
    "ahead, one rank": (AHEAD, 1),
    "ahead of two stages": (PP2 + AHEAD, 2),
    "ahead of two stages, offloaded": (PP2 + AHEAD + OFFLOAD, 2),
    "ahead over tp x pp": (TP2 + PP2 + AHEAD, 4),
    "ahead over tp x pp, offloaded": (TP2 + PP2 + AHEAD + OFFLOAD, 4),
    "ahead over cp, encoder tp 2": (CP2 + AHEAD + ENCODER_TP2, 2),
    "ahead over tp x cp, recompute": (TP2 + SP + CP2 + AHEAD + FULL + ENCODER_FULL, 4),
    "ahead over replicas, encoder tp 2": (PP2 + AHEAD + ENCODER_TP2, 4),
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


SOME = ["data parallel over tp x cp", "larger encoder tp", "ahead over tp x pp", "ahead of two stages, offloaded"]


@pytest.mark.parametrize("mix", ["no image", "one huge"])
@pytest.mark.parametrize("layout", SOME)
def test_other_mixes(layout: str, mix: str, vlm: dict[str, Path], one_process: OneProcess, tmp_path: Path) -> None:
    flags, world = LAYOUTS[layout]
    check(flags, world, mix, vlm, one_process, tmp_path)


@pytest.mark.parametrize("layout", ["data parallel over tp", "ahead over tp x pp"])
def test_micro_batches_that_do_not_divide(
    layout: str, vlm: dict[str, Path], one_process: OneProcess, tmp_path: Path
) -> None:
    """Three micro-batches over domains of two and four ranks."""
    flags, world = LAYOUTS[layout]
    check(flags, world, "mixed", vlm, one_process, tmp_path, gbs=3)


@pytest.mark.parametrize("layout", ["data parallel over tp", "ahead of two stages", "context parallel"])
def test_larger_micro_batches(layout: str, vlm: dict[str, Path], one_process: OneProcess, tmp_path: Path) -> None:
    flags, world = LAYOUTS[layout]
    check(flags, world, "mixed", vlm, one_process, tmp_path, mbs=2)


OPTIMIZER = [
    *("--lr", "1e-3", "--min-lr", "1e-3", "--weight-decay", "0.1", "--clip-grad", "0.5"),
    *("--adam-eps", "1e-5"),  # else the first steps divide rounding by rounding
]
STEPS = ["mixed", "no image", "everywhere"]
SPREAD = {
    "smaller encoder tp": LAYOUTS["smaller encoder tp"],
    "larger encoder tp": LAYOUTS["larger encoder tp"],
    "data parallel, sharded and overlapped": (ZERO1, 2),
    "ahead over tp x pp, sharded and overlapped": (TP2 + PP2 + AHEAD + ZERO1, 4),
    "ahead of two stages, offloaded": LAYOUTS["ahead of two stages, offloaded"],
}


@pytest.mark.parametrize("layout", SPREAD)
def test_weights_after_steps(layout: str, vlm: dict[str, Path], one_process: OneProcess, tmp_path: Path) -> None:
    """The same learning rate, the same gradient norm over all components, the same weights."""
    flags, world = SPREAD[layout]
    results, weights = one_process.steps(OPTIMIZER, STEPS)
    found, mine = steps(config_of(vlm[FAMILY], [*OPTIMIZER, *flags]), world, STEPS, tmp_path)
    for ours, theirs in zip(found, results, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-6)
        assert ours.lr == theirs.lr
    difference, name = worst(mine, weights)
    assert difference < TOLERANCE, name


def test_virtual_stages(vlm: dict[str, Path], one_process: OneProcess, tmp_path: Path) -> None:
    """On the family without deepstack: chunks of one layer cannot take two levels."""
    flags = [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]
    expected = one_process.gradients("mixed", "qwen2_5_vl")
    for name, extra in (("inline", []), ("ahead", AHEAD + OFFLOAD)):
        mine = gradients(config_of(vlm["qwen2_5_vl"], flags + extra), 2, "mixed", tmp_path / name)
        assert mine.loss == pytest.approx(expected.loss, rel=1e-6)
        difference, where = worst(mine.tensors, expected.tensors)
        assert difference < TOLERANCE, (name, where)
