"""The terminal: one line per log interval, and a bar below the lines where there is a terminal to draw on."""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO

from loongforge.core.watch.metrics import StepReport

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

BARS = "".join(chr(0x2581 + height) for height in range(8))
"""Block characters, lowest first."""
HISTORY = 24
"""Losses in the sparkline."""


def line(report: StepReport, total_steps: int, seconds_per_step: float) -> str:
    """One step in words; `seconds_per_step` is what the time left is reckoned with."""
    wait = report.data_wait_seconds / report.seconds if report.seconds else 0.0
    left = timedelta(seconds=round((total_steps - report.step) * seconds_per_step))
    parts = [
        f"step {report.step}/{total_steps}",
        f"loss {report.loss:.4f}",
        f"grad norm {report.grad_norm:.3f}",
        f"lr {report.lr:.3e}",
        f"{report.tokens_per_second:,.0f} tokens/s",
        f"{report.peak_memory_bytes / 2**30:.2f} GiB",
        f"data wait {wait:.0%}",
        f"ETA {left}",
    ]
    parts += [f"{name} {value:.4f}" for name, value in report.extra.items()]
    return " | ".join(parts)


def sparkline(values: list[float]) -> str:
    """Values as a row of bars, the lowest flat and the highest full."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)


class Progress:
    """Writes to `stream`: plain lines, or lines above a bar when it is a terminal."""

    def __init__(self, stream: TextIO, total_steps: int, start_step: int, log_interval: int) -> None:
        self._stream = stream
        self._total = total_steps
        self._interval = log_interval
        self._seconds: deque[float] = deque(maxlen=100)
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        if stream.isatty():
            self._open_bar(start_step)

    def step(self, report: StepReport) -> None:
        """Show a step: the bar always, the line at every log interval and at the last step."""
        self._seconds.append(report.seconds)
        self._losses.append(report.loss)
        if report.step % self._interval == 0 or report.step == self._total:
            self.say(line(report, self._total, sum(self._seconds) / len(self._seconds)))
        if self._bar is not None and self._task is not None:
            picture = f"loss {report.loss:.4f} {sparkline(list(self._losses))}"
            self._bar.update(self._task, completed=report.step, picture=picture)

    def say(self, text: str) -> None:
        """Write one line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open_bar(self, start_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[picture]}"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            transient=True,
        )
        self._task = self._bar.add_task("train", total=self._total, completed=start_step, picture="")
        self._bar.start()
