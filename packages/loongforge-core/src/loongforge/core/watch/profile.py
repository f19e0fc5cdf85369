"""A torch profiler trace of a few steps, one file for each rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.profiler import profile


class Profile:
    """Records the steps first <= step < last, counted as in StepReport, into `<folder>/rank<rank>.json.gz`."""

    def __init__(self, folder: Path, rank: int, first: int, last: int) -> None:
        self.path = folder / f"rank{rank}.json.gz"
        self._first, self._last = first, last
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Start recording when `step`, about to run, is the first one, or a later one because the run was resumed."""
        if self._running is None and self._first <= step < self._last:
            self._running = _start()

    def after(self, step: int) -> bool:
        """Stop and write when the last step has run; whether the file was written now."""
        if self._running is None or step + 1 < self._last:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Write what was recorded, if anything."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(self.path))


def _start() -> profile:
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    running = profile(activities=activities, acc_events=True)  # torch 2.11 warns that it keeps no others
    running.start()
    return running
