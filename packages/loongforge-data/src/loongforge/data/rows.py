"""Rows of text files, with every defect named by file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loongforge.core.data.quarantine import Bad
from loongforge.core.errors import DataError

SHOWN = 5
"""Bad rows that are collected before a file is given up."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is, for messages."""

    path: str
    row: int | str
    """Its line or number from 1, or its key in a shard."""

    def __str__(self) -> str:
        """`rows.jsonl:3`."""
        return f"{self.path}:{self.row}"


class BadRows:
    """Collects rows that cannot be used. Up to `limit` may be, None: any number; beyond, one attempt names several."""

    def __init__(self, limit: int | None = 0) -> None:
        self._limit = limit
        self.found: list[Bad] = []

    def add(self, path: Path | str, place: int | str, reason: str) -> None:
        """Note a bad row by its line (from 1) or key; raises `DataError` once there are too many to go on."""
        self.found.append(Bad(file=str(path), row=place, reason=reason))
        if self._too_many and len(self.found) >= SHOWN:
            self._give_up(f"Stopped after {len(self.found)} bad rows.")

    @property
    def sound(self) -> bool:
        """Whether no row was bad so far."""
        return not self.found

    def check(self) -> None:
        """Raise `DataError` with what was collected, if that is too much."""
        if self._too_many:
            self._give_up()

    @property
    def _too_many(self) -> bool:
        return self._limit is not None and len(self.found) > self._limit

    def _give_up(self, *more: str) -> None:
        allowed = f"--max-bad-samples {self._limit} allows no more."
        raise DataError("\n".join([*map(str, self.found[-SHOWN:]), *more, *([allowed] if self._limit else [])]))


def read_lines(path: Path, bad: BadRows) -> Iterator[tuple[int, bytes]]:
    """Line numbers (from 1) and lines; an empty line between rows is a bad row, at the end of the file it is none."""
    blank: list[int] = []
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    blank.append(number)
                    continue
                for empty in blank:
                    bad.add(path, empty, "an empty line where a JSON object should be.")
                blank.clear()
                yield number, line
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


def parse_row(line: bytes) -> dict[str, Any]:
    """The JSON object on a line; `ValueError` says what it is instead."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object was expected, found {type(row).__name__}.")
    return row


def take_field(row: dict[str, Any], field: str, flag: str) -> Any:
    """`row[field]`; `ValueError` names the fields there are and the flag that chooses another."""
    if field not in row:
        raise ValueError(f"no field {field!r}; there are {', '.join(map(repr, row)) or 'none'} ({flag} chooses).")
    return row[field]


def text_of(row: dict[str, Any], field: str) -> str:
    """The text of a pre-training row; `ValueError` when it is absent, not a string or empty."""
    text = take_field(row, field, "--text-field")
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} holds {type(text).__name__}, not text.")
    if not text:
        raise ValueError(f"field {field!r} is empty.")
    return text


def tools_of(row: dict[str, Any]) -> list[Any] | None:
    """The tools of a conversation, a list or its JSON text; None without any."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f"field 'tools' is not JSON: {error}.") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError("field 'tools' must be a list of tool descriptions.")
    return tools or None
