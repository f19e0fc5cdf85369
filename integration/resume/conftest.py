"""Runs of the trainer for the resume tests: tiny, on forked workers that share one import of megatron-core."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loongforge.core.checkpoint.directory import RunDirectory
from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import RunConfig
from loongforge.core.errors import ForgeError
from loongforge.core.testing import run_distributed

SHAPE = ["--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", "6"]
OPTIMIZER = ["--lr", "1e-2", "--min-lr", "1e-3", "--weight-decay", "0.1", "--lr-warmup-iters", "2"]
SAVING = ["--save-interval", "3", "data.source=mock", "--num-workers", "0"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one rank's `train` ended."""

    error: str | None
    """Class and text of the ForgeError, None when there was none."""
    code: int
    said: str
    """What it printed."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Start runs, take them back in time, look at what they wrote."""

    source: Path
    """Hugging Face directory the runs start from."""

    def config(self, save: Path, flags: Sequence[str] = ()) -> RunConfig:
        """The common configuration with a run's own flags behind it."""
        start = [] if "--load" in flags else ["--load", str(self.source)]
        precision = [] if "--bf16" in flags else ["--fp32"]
        return resolve([*start, "--save", str(save), *precision, *SHAPE, *OPTIMIZER, *SAVING, *flags])

    def outcomes(
        self, save: Path, flags: Sequence[str] = (), world: int = 1, *, before: Callable[[Any], None] | None = None
    ) -> list[Outcome]:
        """Train on `world` forked workers; how each ended. `before(worker)` runs in each worker first."""
        config = self.config(save, flags)

        def work(worker: Any) -> Outcome:
            from loongforge.core.run import train

            if before:
                before(worker)
            said, error, code = io.StringIO(), None, 0
            try:
                with redirect_stdout(said):
                    train(config)
            except ForgeError as problem:
                error, code = f"{type(problem).__name__}: {problem}", problem.exit_code
            except SystemExit as stop:
                code = int(str(stop.code))
            return Outcome(error=error, code=code, said=said.getvalue())

        return run_distributed(work, world, timeout=180)

    def train(self, save: Path, flags: Sequence[str] = (), world: int = 1, **more: Any) -> str:
        """Train to the end without an error; what rank 0 printed."""
        outcomes = self.outcomes(save, flags, world, **more)
        assert [(end.error, end.code) for end in outcomes] == [(None, 0)] * world
        return outcomes[0].said

    def refused(self, save: Path, flags: Sequence[str] = (), world: int = 1, **more: Any) -> str:
        """Train and fail with one and the same error on every rank; its class and text."""
        outcomes = self.outcomes(save, flags, world, **more)
        errors = {end.error for end in outcomes}
        assert len(errors) == 1, errors
        error = errors.pop()
        assert error is not None, outcomes[0].said
        return error

    @staticmethod
    def back(run: Path, copy: Path, step: int = 3) -> Path:
        """A copy of a run as it was when it was killed after the checkpoint of `step`, later metrics included."""
        shutil.copytree(run, copy)
        directory = RunDirectory(copy)
        for later in directory.steps():
            if later > step:
                shutil.rmtree(directory.path(later))
        (copy / "latest").write_text(directory.path(step).name + "\n")
        shutil.rmtree(copy / "hf", ignore_errors=True)
        return copy

    @staticmethod
    def curve(run: Path) -> list[tuple[int, float, float, int]]:
        """Step, loss, gradient norm and consumed samples of every line of metrics.jsonl, all digits."""
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss"], row["grad_norm"], row["consumed_samples"]) for row in rows]

    @staticmethod
    def export(run: Path) -> dict[str, torch.Tensor]:
        """Every tensor of the run's Hugging Face export."""
        from safetensors.torch import load_file

        tensors: dict[str, torch.Tensor] = {}
        for file in sorted((run / "hf").glob("*.safetensors")):
            tensors |= load_file(file)
        assert tensors
        return tensors

    def same_bits(self, left: Path, right: Path) -> None:
        """Both runs have the same numbers in every step and the same bits in every exported tensor."""
        assert self.curve(left) == self.curve(right)
        one, two = self.export(left), self.export(right)
        assert one.keys() == two.keys()
        different = [name for name in one if not torch.equal(one[name], two[name])]
        assert not different


@pytest.fixture(scope="session")
def tied(megatron: Any, qwen3_tied: Path) -> Resume:
    """Runs of the tiny Qwen3 with one matrix for embedding and output."""
    return Resume(source=qwen3_tied)


@pytest.fixture(scope="session")
def untied(megatron: Any, qwen3_untied: Path) -> Resume:
    """Runs of the tiny Qwen3 with an output matrix of its own."""
    return Resume(source=qwen3_untied)


@pytest.fixture(scope="session")
def whole(tied: Resume, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one process with checkpoints after three and six; never changed by a test."""
    run = tmp_path_factory.mktemp("whole") / "run"
    tied.train(run)
    return run


@pytest.fixture(scope="session")
def command() -> list[str]:
    """The command line as a user starts it."""
    return [str(Path(sys.executable).parent / "loongforge"), "train"]
