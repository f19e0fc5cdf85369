"""Work in several processes: rows go out in batches, answers come back in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from loongforge.core.errors import DataError
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
                pending.append(pool.submit(call_made, make, arguments, item))
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


def call_made(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], item: Any) -> Any:
    """`make(*arguments)(item)` in a worker, which keeps what it made."""
    return _made(make, arguments)(item)


@cache
def _made(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> Callable[[Any], Any]:
    """A worker opens its tokenizer once, at the first batch."""
    return make(*arguments)
