"""Argument parsers of the small verbs; `train` and `plan` take Megatron's flags and Hydra overrides (core.config)."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from loongforge.core.cli.shell import VERBS
from loongforge.core.errors import ConfigError
from loongforge.core.plugins import KINDS, did_you_mean


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` where argparse would print its usage and exit."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Called by argparse on a mistake."""
        raise ConfigError(f"{self.prog}: {message}. See {self.prog} --help.")


def parser(verb: str, *examples: str) -> Parser:
    """The parser of a built-in verb: its summary comes from the table of verbs, its examples close the help."""
    return Parser(
        prog=f"loongforge {verb}",
        description=VERBS[verb],
        epilog="\n".join(["examples:", *(f"  loongforge {verb} {example}".rstrip() for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def kind(name: str) -> str:
    """A checked kind of plugin; `ConfigError` with a hint otherwise."""
    return one_of("kind", name, KINDS)


def one_of(what: str, name: str, known: Iterable[str]) -> str:
    """`name` when it is known; `ConfigError` with a hint otherwise."""
    known = tuple(known)
    if name not in known:
        raise ConfigError(f"no {what} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return name
