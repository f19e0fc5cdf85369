"""Rules that every section of a run checks when it is made."""

from __future__ import annotations

from typing import Any

from loongforge.core.errors import ConfigError


def below(least: int, path: str, section: Any, *names: str) -> list[str]:
    """A problem for every field of `section` that is given and smaller than `least`."""
    values = {name: getattr(section, name) for name in names}
    return [
        f"{path}{'.' if path else ''}{name}: must be at least {least}, got {value!r}."
        for name, value in values.items()
        if value is not None and value < least
    ]


def refuse(problems: list[str]) -> None:
    """Raise `ConfigError` with all of them, if there are any."""
    if problems:
        raise ConfigError(*problems)
