"""The command line: one verb, one module, imported when it is called.

A built-in verb is a module of this package with `command(argv: list[str]) -> int`; other wheels add verbs under
`loongforge.commands`. Nothing heavy is imported here, so that help and listing answer at once.
"""

from loongforge.core.cli.shell import VERBS, main

__all__ = ["VERBS", "main"]
