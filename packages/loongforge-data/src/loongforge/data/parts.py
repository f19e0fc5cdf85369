"""Text files in parts that are tokenised apart: byte ranges of lines, row groups of Parquet, whole `.txt` files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from loongforge.core.errors import DataError
from loongforge.data.arrow import count_batches, read_batches
from loongforge.data.indexed import token_type
from loongforge.data.parquet import count_groups, read_group
from loongforge.data.row_files import ROWS, TABLES
from loongforge.data.rows import SHOWN, parse_row, text_of
from loongforge.data.tokenise import TokenizerChoice

TEXT_SUFFIXES = (*ROWS, ".txt")
"""Files that can be tokenised."""
PART_BYTES = 1 << 20
"""Bytes of lines that are tokenised in one piece; after a kill no more is done again for each worker."""
PART_BATCHES = 8
"""Record batches of Arrow likewise; the datasets library puts 1000 rows into one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Lines that begin at byte `first` to `last - 1` of a file, or those row groups or record batches, or a `.txt`."""

    path: str
    first: int
    last: int
    size: int
    """Bytes, of a row group about."""
    ends: bool
    """Whether it is the last of its file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """What decides the tokens of documents, apart from their text."""

    choice: TokenizerChoice
    fields: tuple[str, ...] = ("text",)
    """Fields of a row; each is a document, in a pair of files of its own."""
    append_eod: bool = False


@dataclass(slots=True)
class PartAnswer:
    """The documents of a part, or what is wrong with it. Rows are counted from 1 in the part."""

    tokens: list[np.ndarray] = field(default_factory=list)
    """For each field, uint16 or int32: documents end to end."""
    lengths: list[np.ndarray] = field(default_factory=list)
    """For each field, int32 `[documents]`."""
    rows: int = 0
    """Rows and empty lines."""
    last: int = 0
    """The last row that is no empty line; 0 without any."""
    blank: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    """The first few."""

    def refuse(self, number: int, reason: str) -> None:
        """Note a bad row."""
        if len(self.bad) < SHOWN:
            self.bad.append((number, reason))


def parts_of(paths: Iterable[Path]) -> Iterator[Part]:
    """Parts of all files in order; `DataError` for a file that is absent or of another kind."""
    for path in paths:
        if path.suffix not in TEXT_SUFFIXES:
            raise DataError(f"{path}: {', '.join(TEXT_SUFFIXES[:-1])} and {TEXT_SUFFIXES[-1]} files can be tokenised.")
        if not path.is_file():
            raise DataError(f"no file {path}.")
        borders, share = _borders(path, os.path.getsize(path))
        for first, last in pairwise(borders):
            yield Part(path=str(path), first=first, last=last, size=share or last - first, ends=last == borders[-1])


def _borders(path: Path, size: int) -> tuple[list[int], int]:
    """Where parts begin and the last one ends, and the bytes of each; 0 where the borders are bytes."""
    if path.suffix not in TABLES:
        step = size if path.suffix == ".txt" else PART_BYTES
        return [*range(0, size, step), size] if size else [0, 0], 0
    count, step = (count_groups(path), 1) if path.suffix == ".parquet" else (count_batches(path), PART_BATCHES)
    borders = [*range(0, count, step), count] if count else [0, 0]
    return borders, size // (len(borders) - 1)


class PartEncoder:
    """Parts to tokens; works in any process, which opens files and tokenizer itself."""

    def __init__(self, rules: TextRules, threads: bool) -> None:
        self._fields, self._append_eod, self._threads = rules.fields, rules.append_eod, threads
        self._tokenizer = rules.choice.open()
        self._type = token_type(rules.choice.vocab_size)

    def __call__(self, part: Part) -> PartAnswer:
        """A document of every row for each field, or the rows that are wrong and why."""
        answer = PartAnswer()
        numbers: list[int] = []
        texts: list[tuple[str, ...]] = []
        for number, row in _rows(part, self._fields):
            answer.rows = number
            if row is None:
                answer.blank.append(number)
                continue
            answer.last = number
            try:
                texts.append(self._texts(row, part.path.endswith(".txt")))
                numbers.append(number)
            except ValueError as error:
                answer.refuse(number, str(error))
        for place in range(len(self._fields)):
            documents = [] if answer.bad else self._encode([found[place] for found in texts], numbers, answer)
            answer.lengths.append(np.fromiter(map(len, documents), np.int32, len(documents)))
            arrays = [np.asarray(tokens, self._type) for tokens in documents]
            answer.tokens.append(np.concatenate(arrays) if arrays else np.empty(0, self._type))
        return answer

    def _texts(self, row: Any, whole: bool) -> tuple[str, ...]:
        if whole:
            return (_text(row),) * len(self._fields)
        content = parse_row(row) if isinstance(row, bytes) else row
        return tuple(text_of(content, name) for name in self._fields)

    def _encode(self, texts: list[str], numbers: list[int], answer: PartAnswer) -> list[list[int]]:
        """Tokens per text, with the end token when asked for; a text without any token is bad."""
        tokenizer = self._tokenizer
        try:
            documents = tokenizer.encode_batch(texts) if self._threads else [tokenizer.encode(text) for text in texts]
        except ValueError:  # only NullTokenizer refuses a text; find out which
            for number, text in zip(numbers, texts, strict=True):
                try:
                    tokenizer.encode(text)
                except ValueError as reason:
                    answer.refuse(number, str(reason))
            return []
        for number, tokens in zip(numbers, documents, strict=True):
            if not tokens:
                answer.refuse(number, "the text has no token.")
        return [[*tokens, tokenizer.eos_id] for tokens in documents] if self._append_eod else documents


def _rows(part: Part, fields: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    """Number in the part, and a line, the fields of a row, the bytes of a file, or None for an empty line."""
    path = Path(part.path)
    try:
        if path.suffix == ".parquet":
            yield from read_group(path, part.first, fields) if part.last else ()
        elif path.suffix == ".arrow":
            yield from read_batches(path, part.first, part.last, fields)
        elif path.suffix == ".txt":
            yield 1, path.read_bytes()
        else:
            yield from enumerate(_lines(path, part.first, part.last), start=1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


def _lines(path: Path, first: int, last: int) -> Iterator[bytes | None]:
    with open(path, "rb") as stream:
        if first:  # a line belongs to the part it begins in
            stream.seek(first - 1)
            stream.readline()
        while stream.tell() < last and (line := stream.readline()):
            yield line if line.strip() else None


def _text(content: bytes) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the file.") from error
    if not text.strip():
        raise ValueError("the file holds no text.")
    return text.replace("\r\n", "\n").replace("\r", "\n")
