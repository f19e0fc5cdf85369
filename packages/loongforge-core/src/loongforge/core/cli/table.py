"""Plain text for terminals and pipes alike. No library: a listing must not wait for one to be imported."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence


def columns(rows: Sequence[Sequence[str]], *, indent: str = "") -> list[str]:
    """Left-aligned columns, two spaces apart; the last one runs free."""
    if not rows:
        return []
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]) - 1)]
    padded = (
        [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[len(widths)]] for row in rows
    )
    return [indent + "  ".join(cells).rstrip() for cells in padded]


def wrapped(text: str, *, indent: str) -> list[str]:
    """`text` folded at the terminal's width (80 at least, 120 at most), every line indented."""
    width = min(120, max(80, shutil.get_terminal_size().columns))
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def spoken(value: object) -> str:
    """A value as a reader wants it: a list as its items, nothing as `-`."""
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, Iterable):
        return ", ".join(str(item) for item in value) or "-"
    return "-" if value is None else str(value)
