"""Is a model family whole and right? `check_family` answers for any registered family, whoever ships it."""

from __future__ import annotations

from loongforge.core.testing.conformance.check import check_family
from loongforge.core.testing.conformance.report import FamilyReport, Outcome

__all__ = ["FamilyReport", "Outcome", "check_family"]
