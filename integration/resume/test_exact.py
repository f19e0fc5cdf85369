"""A run that was killed and started again ends with the bits of one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
ZERO1 = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
EXPORT = ["--save-hf", "true"]

RUNS: dict[str, tuple[list[str], int]] = {
    "one": ([], 1),
    "dropout": (["--attention-dropout", "0.2"], 1),
    "packed": (["--sft"], 1),
    "bf16": (["--bf16"], 1),
    "dp2-zero1-overlap": (ZERO1, 2),
    "dp2-zero1-bf16": ([*ZERO1, "--bf16"], 2),
    "tp2-dropout": ([*TP2, "--attention-dropout", "0.2"], 2),
    "pp2": (PP2, 2),
    "pp2-zero1": ([*PP2, "--use-distributed-optimizer"], 2),
    "dp2-zero1-buckets": ([*ZERO1, "--ddp-bucket-size", "5000"], 2),
    "one-async": (["--async-save"], 1),
    "dp2-zero1-async": ([*ZERO1, "--async-save"], 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name: str, tied: Any, tmp_path: Path) -> None:
    flags, world = RUNS[name]
    uninterrupted = tmp_path / "uninterrupted"
    tied.train(uninterrupted, [*flags, *EXPORT], world)
    resumed = tied.back(uninterrupted, tmp_path / "resumed")
    said = tied.train(resumed, [*flags, *EXPORT], world)
    assert "Resuming at step 3, sample 12" in said
    assert [step for step, *_ in tied.curve(resumed)] == [1, 2, 3, 4, 5, 6]
    tied.same_bits(resumed, uninterrupted)


def test_dropout_changes_the_numbers_so_that_its_case_above_can_fail(tied: Any, whole: Path, tmp_path: Path) -> None:
    flags = ["--attention-dropout", "0.2"]
    tied.train(tmp_path / "dropout", flags)
    assert tied.curve(tmp_path / "dropout") != tied.curve(whole)
    other = tied.back(tmp_path / "dropout", tmp_path / "other")
    tied.train(other, [*flags, "--load", str(other), "--no-load-rng"])
    assert tied.curve(other)[:3] == tied.curve(tmp_path / "dropout")[:3]
    assert tied.curve(other)[3:] != tied.curve(tmp_path / "dropout")[3:]


def test_background_and_foreground_saves_are_equal(tied: Any, whole: Path, tmp_path: Path) -> None:
    tied.train(tmp_path / "run", ["--async-save"])
    resumed = tied.back(tmp_path / "run", tmp_path / "resumed")
    tied.train(resumed)
    assert tied.curve(resumed) == tied.curve(whole)
