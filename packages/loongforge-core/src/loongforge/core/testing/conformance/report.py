"""What the kit found."""

from __future__ import annotations

from dataclasses import dataclass


class Skipped(Exception):
    """Raised by a check that cannot be made here; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One check that passed or was skipped."""

    check: str
    skipped: bool
    detail: str
    """What was measured, or why the check was skipped."""

    def __str__(self) -> str:
        return f"{'skipped' if self.skipped else 'passed':8} {self.check}: {self.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyReport:
    """Every check of a family that conforms; a family that does not raises instead."""

    family: str
    owner: str
    """Distribution and version that registered the family."""
    outcomes: tuple[Outcome, ...]

    @property
    def skipped(self) -> tuple[Outcome, ...]:
        """Checks that could not be made in this environment."""
        return tuple(outcome for outcome in self.outcomes if outcome.skipped)

    def __str__(self) -> str:
        return "\n".join([f"{self.family} of {self.owner} conforms:", *map(str, self.outcomes)])
