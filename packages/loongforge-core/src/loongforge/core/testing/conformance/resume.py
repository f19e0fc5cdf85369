"""A run that was stopped and resumed ends with the bytes of one that was not."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

from loongforge.core.checkpoint.directory import RunDirectory
from loongforge.core.config.run import RunConfig
from loongforge.core.run import train
from loongforge.core.testing.conformance.subject import STEPS, Subject
from loongforge.core.testing.distributed import run_distributed


def is_exact(subject: Subject) -> str:
    """Train `STEPS` steps with a checkpoint half way; resume there into another directory; compare the exports."""
    case, half = subject.cases[0], STEPS // 2
    whole, resumed = case.directory / "whole", case.directory / "resumed"
    _train(subject.run(case, save=str(whole), save_interval=half, save_hf=True))
    checkpoint = RunDirectory(whole).path(half)
    _train(subject.run(case, load=str(checkpoint), save=str(resumed), save_hf=True))
    left, right = _contents(whole / "hf"), _contents(resumed / "hf")
    different = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    assert not different, (
        f"{case.label} model: {STEPS} steps, and {half} steps resumed to {STEPS}, end with different "
        f"{', '.join(different)}. Does the model hold state that its checkpoint does not?"
    )
    return f"{STEPS} steps are bitwise those of a run resumed after {half}"


def _train(config: RunConfig) -> None:
    def work(_: object) -> None:
        with redirect_stdout(io.StringIO()):
            train(config)

    run_distributed(work, 1)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
