"""Rows of Parquet files, a batch at a time: a file is never held whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loongforge.core.errors import DataError

INSTALL = "pip install 'loongforge-data[parquet]'"
_BATCH_ROWS = 1024


def read_parquet(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers (from 1) and rows as Python values, of the given columns or of all, in the order they stand.

    A field of a nested object that holds nothing is left out: Parquet gives every object the fields of all, which a row
    of `.jsonl` need not have. A column that holds nothing stays, as None. `DataError` when the file cannot be read,
    when it has no such column, or when pyarrow is absent.
    """
    with _opened(path) as file:
        yield from numbered(_batches(path, file, columns))


def count_rows(path: str | Path) -> int:
    """Rows of a Parquet file, from its end alone; `DataError` as `read_parquet`."""
    with _opened(path) as file:
        return file.metadata.num_rows


def count_groups(path: str | Path) -> int:
    """Row groups of a Parquet file, which can be read apart; `DataError` as `read_parquet`."""
    with _opened(path) as file:
        return file.metadata.num_row_groups


def read_group(path: str | Path, group: int, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_parquet`, of one row group, whose rows are counted from 1."""
    with _opened(path) as file:
        yield from numbered(_batches(path, file, columns, row_groups=[group]))


def numbered(batches: Iterable[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers (from 1) and rows of Arrow record batches, without the empty fields of nested objects."""
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, {name: _filled(value) for name, value in row.items()}


def _batches(path: str | Path, file: Any, columns: Sequence[str] | None, **options: Any) -> Iterator[Any]:
    names = list(file.schema_arrow.names)
    for column in columns or ():
        if column not in names:
            raise DataError(f"{path}: no column {column!r}; there are {', '.join(map(repr, names)) or 'none'}.")
    chosen = None if columns is None else list(columns)
    # One thread, for rows are tokenised elsewhere meanwhile, and none is left behind in a process that forks.
    return file.iter_batches(_BATCH_ROWS, columns=chosen, use_threads=False, **options)


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path}: Parquet files need pyarrow: {INSTALL}") from error
    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"no file {path}.") from error
    except (pyarrow.ArrowException, OSError) as error:  # ArrowException: damage found while rows are read
        raise DataError(f"{path}: not a readable Parquet file: {error}.") from error


def _filled(value: Any) -> Any:
    """Objects without the fields that hold nothing, at any depth."""
    if isinstance(value, dict):
        return {name: _filled(one) for name, one in value.items() if one is not None}
    return [_filled(one) for one in value] if isinstance(value, list) else value
