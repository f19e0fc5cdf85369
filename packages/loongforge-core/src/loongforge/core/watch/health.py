"""A sign that a run is ill: a loader that cannot keep up."""

from __future__ import annotations

from loongforge.core.watch.metrics import StepReport

STARVATION_STEPS = 20
"""Steps that are added up before the loader is judged."""
STARVATION_SHARE = 0.2
"""Share of time spent waiting for data from which a hint is given."""


class Starvation:
    """Adds up the time spent waiting for data and hints once, when the loader starves the run."""

    def __init__(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._waited = 0.0
        self._hinted = False

    def hint(self, report: StepReport, num_workers: int) -> str | None:
        """One line of advice, or None."""
        self._steps += 1
        self._seconds += report.seconds
        self._waited += report.data_wait_seconds
        if self._hinted or self._steps < STARVATION_STEPS:
            return None
        share = self._waited / self._seconds if self._seconds else 0.0
        steps, self._steps, self._seconds, self._waited = self._steps, 0, 0.0, 0.0
        if share <= STARVATION_SHARE:
            return None
        self._hinted = True
        return (
            f"{share:.0%} of the last {steps} steps went into waiting for data. "
            f"Raise data.num_workers (now {num_workers}) or prepare the data once into .bin/.idx."
        )
