"""Experiment trackers: where reports go besides `metrics.jsonl`. Each imports its library when it is made."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from loongforge.core.config.run import RunConfig
from loongforge.core.errors import ConfigError
from loongforge.core.watch.metrics import StepReport

PROJECT = "loongforge"
"""Project that wandb and swanlab file runs under."""


class Tracker(Protocol):
    """Takes the report of every step on the main rank."""

    def log(self, report: StepReport) -> None:
        """Record one step."""
        ...

    def close(self) -> None:
        """Finish; nothing is logged afterwards."""
        ...


def tensorboard(config: RunConfig, directory: Path | None) -> Tracker:
    """Event files in `watch.tensorboard_dir`, or in `<save>/tensorboard`."""
    folder = config.watch.tensorboard_dir or (directory / "tensorboard" if directory else None)
    if folder is None:
        raise ConfigError("watch.trackers: tensorboard needs --save or --tensorboard-dir to write to.")
    return TensorBoard(Path(folder))


class TensorBoard:
    """Scalars through torch.utils.tensorboard."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, report: StepReport) -> None:
        """One scalar for each number."""
        for name, value in numbers(report).items():
            self._writer.add_scalar(name, value, report.step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


def wandb(config: RunConfig, directory: Path | None) -> Tracker:
    """A wandb run that a resumed run continues; `WANDB_MODE=offline` keeps it on this machine."""
    import wandb as library  # pyright: ignore[reportMissingImports]

    run = library.init(
        project=PROJECT,
        dir=str(directory) if directory else None,
        config=asdict(config),
        id=run_id(directory, "wandb"),
        resume="allow",
    )
    return Logged(run)


def swanlab(config: RunConfig, directory: Path | None) -> Tracker:
    """A swanlab run; `SWANLAB_MODE=local` keeps it on this machine."""
    import swanlab as library  # pyright: ignore[reportMissingImports]

    library.init(project=PROJECT, logdir=str(directory / "swanlab") if directory else None, config=asdict(config))
    return Logged(library)


class Logged:
    """A library or run with `log(values, step=...)` and `finish()`."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, report: StepReport) -> None:
        """All numbers of the step at once."""
        self._run.log(numbers(report), step=report.step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def numbers(report: StepReport) -> dict[str, float]:
    """What is drawn over steps: every number but the step itself."""
    return {name: float(value) for name, value in report.values().items() if name != "step"}


def run_id(directory: Path | None, tracker: str) -> str | None:
    """The run's id in its directory, made at the first start, so that a resumed run goes on in the same curve."""
    if directory is None:
        return None
    path = directory / f"{tracker}-run-id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
