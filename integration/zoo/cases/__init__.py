"""Every tiny model of the zoo: each file of this folder brings the `CASES` of one family."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module

from case import Case


def _collect() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        cases: Mapping[str, Case] = import_module(f"{__name__}.{module}").CASES
        twice = found.keys() & cases.keys()
        assert not twice, f"cases/{module}.py names {sorted(twice)} once more"
        found |= cases
    return found


CASES: dict[str, Case] = _collect()
