"""How far a long preparation has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

QUIET_SECONDS = 10.0
"""Seconds between lines where there is no terminal; work that is done sooner prints none."""


@contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(bytes_done)`. Writes to stderr, so that a command's output stays clean."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(label, total=total_bytes)
            yield lambda done: bar.advance(task, done)
        return
    told, seen = time.monotonic(), 0

    def advance(done: int) -> None:
        nonlocal told, seen
        seen += done
        if time.monotonic() - told >= QUIET_SECONDS:
            told = time.monotonic()
            console.print(f"{label}: {seen / max(total_bytes, 1):.0%} of {total_bytes / 1e6:.0f} MB", highlight=False)

    yield advance
