"""Runtime substitutions: each one named, with its reason and the day it can go.

Nothing is edited on disk and nothing happens at import; `install` runs once per process from a platform or a repair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

ORIGINAL = "_loongforge_original"
"""Attribute of every replacement: what stood there, None when nothing did."""

REASON = "_loongforge_reason"
"""Attribute of every replacement: why it is there."""


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """Replace `owner.name` by `make(original)`."""

    owner: Any
    """Module or class that holds the attribute."""
    name: str
    make: Callable[[Any], Any]
    """Builds the replacement, a function or a class, from what stood there."""
    why: str
    upstream: str
    """Where upstream assumes otherwise."""
    remove_when: str

    @property
    def target(self) -> str:
        """Dotted name of what is replaced."""
        return (
            f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"
            if isinstance(self.owner, type)
            else (f"{self.owner.__name__}.{self.name}")
        )

    def install(self) -> None:
        """Put the replacement in place; once, however often it is called."""
        current = getattr(self.owner, self.name, None)
        if hasattr(current, ORIGINAL):
            assert getattr(current, REASON) == self.why, f"{self.target} is already replaced, for another reason"
            return
        replacement = self.make(current)
        setattr(replacement, ORIGINAL, current)
        setattr(replacement, REASON, self.why)
        setattr(self.owner, self.name, replacement)


def install(substitutions: Iterable[Substitution]) -> None:
    """Install all of them, in order."""
    for substitution in substitutions:
        substitution.install()
