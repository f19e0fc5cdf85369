"""Text files to `.bin/.idx`: rows are parsed and tokenised in processes, written in order by one."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from loongforge.core.errors import DataError
from loongforge.data.indexed import IndexedWriter
from loongforge.data.progress import progress
from loongforge.data.row_files import read_rows
from loongforge.data.rows import BadRows, parse_row, text_of
from loongforge.data.tokenizer import HFTokenizer, NullTokenizer, open_tokenizer

BATCH_ROWS = 256
"""Rows handed to a worker at a time."""
PARALLEL_BYTES = 32 << 20
"""Below this size starting processes costs more than it saves."""

Rows = list[tuple[int, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerChoice:
    """Everything a worker process needs to open the tokenizer."""

    path: str | None
    kind: str | None
    vocab_size: int

    def open(self) -> HFTokenizer | NullTokenizer:
        """The tokenizer; see `open_tokenizer`."""
        return open_tokenizer(self.path, self.kind, self.vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Answer for a batch of rows: documents in order, and what was wrong."""

    tokens: list[list[int]]
    bad: list[tuple[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a new `.bin/.idx` pair holds."""

    documents: int
    tokens: int


class TextEncoder:
    """Rows with a text field to documents; sent to worker processes, where the tokenizer is opened."""

    def __init__(self, choice: TokenizerChoice, field: str, append_eod: bool, threads: bool) -> None:
        self._tokenizer = choice.open()
        self._field = field
        self._append_eod = append_eod
        self._threads = threads

    def __call__(self, rows: Rows) -> Documents:
        """Documents of the rows that are good, reasons for the others."""
        texts: list[str] = []
        bad: list[tuple[int, str]] = []
        for number, line in rows:
            try:
                texts.append(text_of(parse_row(line), self._field))
            except ValueError as error:
                bad.append((number, str(error)))
        tokens = [] if bad else self.encode(texts, [number for number, _ in rows], bad)
        return Documents(tokens=tokens, bad=bad)

    def encode(self, texts: list[str], lines: list[int], bad: list[tuple[int, str]]) -> list[list[int]]:
        """Tokens per text, with the end token when asked for; a text without any token is bad."""
        try:
            tokenizer = self._tokenizer
            documents = tokenizer.encode_batch(texts) if self._threads else [tokenizer.encode(text) for text in texts]
        except ValueError:  # only NullTokenizer refuses a text; find out which
            bad.extend(self._refused(texts, lines))
            return []
        bad.extend(
            (number, "the text has no token.") for number, tokens in zip(lines, documents, strict=True) if not tokens
        )
        if self._append_eod:
            documents = [[*tokens, self._tokenizer.eos_id] for tokens in documents]
        return documents

    def _refused(self, texts: list[str], lines: list[int]) -> Iterator[tuple[int, str]]:
        for number, text in zip(lines, texts, strict=True):
            try:
                self._tokenizer.encode(text)
            except ValueError as reason:
                yield number, str(reason)


def write_documents(
    paths: Sequence[Path], prefix: str, choice: TokenizerChoice, *, field: str, append_eod: bool, workers: int
) -> Written:
    """Tokenise files of rows (one document each) and `.txt` files (one document), in order, into `prefix.bin/.idx`.

    `workers` 0 stays in this process (tokenizers use threads of their own). `DataError` names bad rows by file and
    line; nothing is left behind then.
    """
    bad = BadRows()
    with IndexedWriter(prefix, choice.vocab_size) as writer:
        for path in paths:
            before = writer.documents
            if path.suffix == ".txt":
                writer.add(_whole_file(path, TextEncoder(choice, field, append_eod, True), bad))
            else:
                arguments = (choice, field, append_eod, not workers)
                with progress(f"tokenising {path.name}", os.path.getsize(path)) as advance:
                    rows = read_rows(path, bad, advance, [field])
                    for answer in in_order(TextEncoder, arguments, batched(rows), workers):
                        for number, reason in answer.bad:
                            bad.add(path, number, reason)
                        writer.add(answer.tokens)
            bad.check()
            if writer.documents == before:
                raise DataError(f"{path} holds no row.")
        writer.finish()
    return Written(documents=writer.documents, tokens=writer.tokens)


def batched[T](rows: Iterable[T]) -> Iterator[list[T]]:
    """Rows in batches of BATCH_ROWS."""
    iterator = iter(rows)
    while batch := list(islice(iterator, BATCH_ROWS)):
        yield batch


def spare_workers(path: Path) -> int:
    """Worker processes that preparing `path` is worth: none for a small file, at most 8."""
    return min(8, len(os.sched_getaffinity(0))) if os.path.getsize(path) > PARALLEL_BYTES else 0


def in_order[In, Out](
    make: Callable[..., Callable[[In], Out]], arguments: tuple[Any, ...], work: Iterable[In], workers: int
) -> Iterator[Out]:
    """`make(*arguments)(item)` for every item of `work`, in order, with a bounded number of items under way.

    Workers are spawned: the calling process may hold threads and devices that do not survive a fork.
    """
    if workers == 0:
        yield from map(make(*arguments), work)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending: deque[Future[Any]] = deque()
        try:
            for item in work:
                pending.append(pool.submit(_call, make, arguments, item))
                if len(pending) >= 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"one of {workers} tokenising processes ended by force, perhaps for lack of memory."
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _call(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], item: Any) -> Any:
    return _made(make, arguments)(item)


@cache
def _made(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> Callable[[Any], Any]:
    """A worker opens its tokenizer once, at the first batch."""
    return make(*arguments)


def _whole_file(path: Path, encoder: TextEncoder, bad: BadRows) -> list[list[int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        bad.add(path, 1, f"not UTF-8 at byte {error.start} of the file.")
        return []
    if not text.strip():
        bad.add(path, 1, "the file holds no text.")
        return []
    found: list[tuple[int, str]] = []
    documents = encoder.encode([text], [1], found)
    for number, reason in found:
        bad.add(path, number, reason)
    return documents
