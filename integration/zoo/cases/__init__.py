"""Every tiny model of the zoo: each file of this folder brings the `CASES` of one family."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module

from case import Case


def _collect(table: str) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        cases: Mapping[str, Case] = getattr(import_module(f"{__name__}.{module}"), table, {})
        twice = found.keys() & cases.keys()
        assert not twice, f"cases/{module}.py names {sorted(twice)} once more"
        found |= cases
    return found


CASES: dict[str, Case] = _collect("CASES")
EVERY: dict[str, Case] = CASES | _collect("FURTHER")
"""With those that single tests look at, `FURTHER` of a file."""
