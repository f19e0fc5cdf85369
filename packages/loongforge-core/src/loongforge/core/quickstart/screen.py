"""What the quickstart says: colours on a terminal, plain text in a pipe or a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Screen:
    """Writes to `stream`; never folds a path or a command, so that both can be copied."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._number = 0

    def stage(self, title: str, finished_before: bool) -> None:
        """A new stage begins, or is passed by."""
        self._number += 1
        self._console.print()
        self._console.print(Text(f"{self._number}. {title}", style="bold cyan"), end="")
        self._console.print(Text(" (done before)" if finished_before else "", style="dim"))
        self.flush()

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(Text(text))
        self.flush()

    def command(self, text: str) -> None:
        """A command to repeat."""
        self._console.print(Text(f"$ {text}", style="green"))
        self.flush()

    def heading(self, text: str) -> None:
        """A line that stands out."""
        self._console.print()
        self._console.print(Text(text, style="bold"))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows under a header: the first column to the left, numbers in the others to the right."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._console.print(table)
        self.flush()

    def flush(self) -> None:
        """Let what was said appear before a training writes to the same stream."""
        self._console.file.flush()
