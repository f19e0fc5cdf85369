"""Everything that looks at a step once it is done, behind one object."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from loongforge.core import env, plugins
from loongforge.core.config.run import RunConfig
from loongforge.core.errors import ConfigError
from loongforge.core.watch.health import Starvation
from loongforge.core.watch.metrics import MetricsFile, StepReport
from loongforge.core.watch.profile import Profile
from loongforge.core.watch.progress import Progress
from loongforge.core.watch.trackers import Tracker


class Watch:
    """Takes the report of every step on every rank; only the main rank writes and speaks, all ranks profile.

    `directory` is the run's directory, None when nothing is saved; `start_step` counts the steps done before. `stream`
    is the terminal, standard output when not given. Raises the `ForgeError` family when a tracker is unknown or not
    installed or the directory cannot be written.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path | None,
        is_main: bool,
        total_steps: int,
        start_step: int,
        stream: TextIO | None = None,
    ) -> None:
        self._config = config
        self._main = is_main
        self._said: set[str] = set()
        self._starvation = Starvation()
        self._metrics: MetricsFile | None = None
        self._trackers: dict[str, Tracker] = {}
        self._profile = _profile(config, directory)
        with ExitStack() as opened:
            if is_main:
                for name, tracker in _trackers(config, directory):
                    self._trackers[name] = tracker
                    opened.callback(self._finish, name, tracker)
                if directory is not None:
                    self._metrics = MetricsFile(directory, start_step)
                    opened.callback(self._metrics.close)
                self._progress = Progress(stream or sys.stdout, total_steps, start_step, config.watch.log_interval)
                opened.callback(self._progress.close)
            self._opened = opened.pop_all()
        if is_main and self._metrics is None:
            self.note("No metrics.jsonl is written: no --save was given.")
        if self._metrics is not None and self._metrics.cut:
            self.note(f"{self._metrics.path}: cut {self._metrics.cut} lines after step {start_step}.")
        if self._profile is not None:
            self._profile.before(start_step + 1)

    def step(self, report: StepReport) -> None:
        """Record and show a finished step."""
        if self._profile is not None:
            if self._profile.after(report.step):
                self.note(f"Profile: {self._profile.path}")
            self._profile.before(report.step + 1)
        if not self._main:
            return
        if self._metrics is not None:
            self._metrics.write(report)
        self._progress.step(report)
        for name in tuple(self._trackers):
            self._track(name, report)
        if hint := self._starvation.hint(report, self._config.data.num_workers):
            self.note(hint)

    def note(self, text: str) -> None:
        """Say one line, once, on the main rank."""
        if self._main and text not in self._said:
            self._said.add(text)
            self._progress.say(text)

    def close(self) -> None:
        """Write and close everything; safe to call twice."""
        if self._profile is not None:
            self._profile.close()
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _track(self, name: str, report: StepReport) -> None:
        try:
            self._trackers[name].log(report)
        except Exception as error:  # noqa: BLE001 - a tracker's server may fail in any way; training goes on, said aloud
            del self._trackers[name]
            self.note(f"Tracker {name} stopped at step {report.step}: {type(error).__name__}: {error}")

    def _finish(self, name: str, tracker: Tracker) -> None:
        try:
            tracker.close()
        except Exception as error:  # noqa: BLE001 - as above; what training wrote is safe
            self.note(f"Tracker {name} did not finish: {type(error).__name__}: {error}")


def _trackers(config: RunConfig, directory: Path | None) -> Iterator[tuple[str, Tracker]]:
    names = dict.fromkeys(config.watch.trackers)
    if config.watch.tensorboard_dir:
        names["tensorboard"] = None
    for name in names:
        yield name, plugins.load("trackers", name).make()(config, directory)


def _profile(config: RunConfig, directory: Path | None) -> Profile | None:
    watch = config.watch
    if not watch.profile:
        return None
    if directory is None:
        raise ConfigError("watch.profile: the trace goes to <save>/profile; give --save.")
    worker = env.worker()
    rank = worker.rank if worker else 0
    return Profile(directory / "profile", rank, watch.profile_step_start, watch.profile_step_end)
