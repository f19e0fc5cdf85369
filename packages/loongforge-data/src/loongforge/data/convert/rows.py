"""Rows of a JSON list, of `.jsonl` and of Parquet files, one after the other: no file is ever held whole."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from loongforge.core.errors import DataError
from loongforge.data.rows import parse_row

CHUNK = 1 << 20
"""Characters read at a time."""
LONGEST_ROW = 256 << 20
"""Characters of a row at which a JSON list is given up, so that a missing bracket does not fill the memory."""
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the input."""

    number: int
    """From 1."""
    line: int | None
    """Where it begins, from 1; None in Parquet."""
    value: Any
    size: int
    """Bytes of the file that are read with it."""
    problem: str = ""
    """Why there is no value."""


def read_rows(path: Path) -> Iterator[Row]:
    """Rows in the order they stand. A line that is no JSON object is a row with a problem; empty lines are none.

    `DataError` where nothing behind can be read: a JSON list that breaks off, text that is not UTF-8.
    """
    if path.suffix not in (".json", ".jsonl", ".parquet"):
        raise DataError(f"{path}: .json (a list of rows), .jsonl and .parquet files can be converted.")
    try:
        if path.suffix == ".parquet":
            yield from _table(path)
        elif path.suffix == ".json" and _begins_with(path, b"["):
            yield from _list(path)
        else:
            yield from _lines(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} near byte {error.start} of a block).") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


def _begins_with(path: Path, mark: bytes) -> bool:
    with open(path, "rb") as stream:
        return stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == mark


def _lines(path: Path) -> Iterator[Row]:
    number = 0
    with open(path, "rb") as stream:
        for line, content in enumerate(stream, start=1):
            if not content.strip():
                continue
            number += 1
            try:
                value, problem = parse_row(content.removeprefix(b"\xef\xbb\xbf")), ""
            except (ValueError, RecursionError) as error:
                value, problem = None, str(error)
            yield Row(number=number, line=line, value=value, size=len(content), problem=problem)


def _table(path: Path) -> Iterator[Row]:
    from loongforge.data.parquet import count_rows, read_parquet

    size = os.path.getsize(path) // max(1, count_rows(path))
    for number, value in read_parquet(path):
        yield Row(number=number, line=None, value=value, size=size)


def _list(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as stream:
        text = _Text(path, stream)
        text.take("[")
        number, done = 0, 0
        while (found := text.look()) != "]":
            if number:
                text.take(",")
                found = text.look()
            number += 1
            line = text.line
            value = text.value()
            here = file.tell()
            problem = "" if found == "{" else f"a JSON object was expected, found {type(value).__name__}."
            yield Row(number=number, line=line, value=value, size=here - done, problem=problem)
            done = here
        text.take("]")
        if text.look():
            raise DataError(f"{path}:{text.line}: something follows the end of the list.")


class _Text:
    """A text file of which only the row that is being read is held."""

    def __init__(self, path: Path, stream: TextIO) -> None:
        self._path, self._stream = path, stream
        self._text, self._at = "", 0
        self._decoder = json.JSONDecoder()
        self.line = 1

    def look(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None, "it matches nothing as well"
            self._move(match.end())
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, wanted: str) -> None:
        """Step over a character that must be there."""
        if (found := self.look()) != wanted:
            what = f"found {found!r}" if found else "the file ends: it is cut off"
            raise DataError(f"{self._path}:{self.line}: {wanted!r} was expected in the list, {what}.")
        self._move(self._at + 1)

    def value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                if len(self._text) - self._at > LONGEST_ROW or not self._more():
                    raise DataError(
                        f"{self._path}:{self.line}: a row begins here that is not whole JSON: {error}."
                    ) from error
                continue
            if end == len(self._text) and self._more():  # a number may go on
                continue
            self._move(end)
            return value

    def _move(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        """Read on, the more the longer the row is; False at the end."""
        kept = self._text[self._at :]
        added = self._stream.read(max(CHUNK, len(kept)))
        self._text, self._at = kept + added, 0
        return bool(added)
