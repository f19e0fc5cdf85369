"""Watching a run: metrics, progress, trackers, profiler, health. Importing it imports no torch."""

from loongforge.core.watch.metrics import StepReport as StepReport
from loongforge.core.watch.metrics import read_metrics as read_metrics
from loongforge.core.watch.trackers import Tracker as Tracker
from loongforge.core.watch.watch import Watch as Watch
