"""The plan: every derived number of a run, computed once, before any device is touched."""

from __future__ import annotations

from loongforge.core.plan.layout import EncoderLayout, Layout
from loongforge.core.plan.parameters import count_parameters, stage_parameters
from loongforge.core.plan.plan import Plan
from loongforge.core.plan.report import Report, report

__all__ = ["EncoderLayout", "Layout", "Plan", "Report", "count_parameters", "report", "stage_parameters"]
