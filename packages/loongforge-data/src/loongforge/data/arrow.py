"""Rows of Arrow files, as the datasets library of Hugging Face keeps them; batch by batch, mapped and not copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from loongforge.core.errors import DataError
from loongforge.data.parquet import INSTALL, numbered

_FILE_MAGIC = b"ARROW1"
"""Begins an Arrow file with an index at its end; the datasets library writes streams, which have none."""


def read_arrow(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers (from 1) and rows, as `read_parquet` gives them; `DataError` likewise."""
    with _opened(path) as (schema, batches):
        yield from numbered(_chosen(path, schema, batches, columns))


def count_batches(path: str | Path) -> int:
    """Record batches of an Arrow file; `DataError` as `read_arrow`."""
    with _opened(path) as (_, batches):
        return sum(1 for _ in batches)


def read_batches(
    path: str | Path, first: int, last: int, columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_arrow`, of the record batches `first` to `last - 1`, whose rows are counted from 1."""
    with _opened(path) as (schema, batches):
        yield from numbered(_chosen(path, schema, islice(batches, first, last), columns))


def count_arrow(path: str | Path) -> int:
    """Rows of an Arrow file; `DataError` as `read_arrow`."""
    with _opened(path) as (_, batches):
        return sum(batch.num_rows for batch in batches)


def _chosen(path: str | Path, schema: Any, batches: Iterator[Any], columns: Sequence[str] | None) -> Iterator[Any]:
    for column in columns or ():
        if column not in schema.names:
            raise DataError(f"{path}: no column {column!r}; there are {', '.join(map(repr, schema.names))}.")
    return (batch if columns is None else batch.select(list(columns)) for batch in batches)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Schema and record batches."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{path}: Arrow files need pyarrow: {INSTALL}") from error
    try:
        with open(path, "rb") as file:
            indexed = file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        with pyarrow.memory_map(str(path)) as source:
            if indexed:
                reader = pyarrow.ipc.open_file(source)
                yield reader.schema, map(reader.get_batch, range(reader.num_record_batches))
            else:
                stream = pyarrow.ipc.open_stream(source)
                yield stream.schema, iter(stream)
    except FileNotFoundError as error:
        raise DataError(f"no file {path}.") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Arrow file: {error}.") from error
