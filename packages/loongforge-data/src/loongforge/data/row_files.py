"""The files behind a path of data, and their rows as lines of JSON, whatever holds them."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loongforge.core.errors import DataError
from loongforge.data.arrow import count_arrow, read_arrow
from loongforge.data.parquet import count_rows, read_parquet
from loongforge.data.rows import BadRows, read_lines

LINES = (".jsonl", ".json")
"""Files with one JSON object per line."""
TABLES = (".parquet", ".arrow")
ROWS = (*LINES, *TABLES)
_EVERY = 256
"""Rows between two advances of a progress bar."""
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}")
"""How the datasets library and the hub name the files of a split."""


def row_files(path: str | Path) -> list[Path]:
    """The file itself, or the files of rows in a directory, by name: `.jsonl`, `.parquet`, or what the datasets library
    saved there. `DataError` when there are none, or files of several kinds or splits.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.suffix not in ROWS:
            raise DataError(f"{path}: rows are read from {', '.join(ROWS)} files and directories of them.")
        if not folder.is_file():
            raise DataError(f"no file {path}.")
        return [folder]
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(one.parent.name for one in folder.glob("*/state.json"))
        raise DataError(f"{path} holds the splits {', '.join(splits)}: give one, {folder / (splits or ['SPLIT'])[0]}.")
    if (folder / "state.json").is_file():
        return _saved(folder)
    found = sorted(one for one in folder.iterdir() if one.suffix in (".jsonl", ".parquet"))
    kinds = sorted({one.suffix for one in found})
    if len(kinds) != 1:
        held = f"both {' and '.join(kinds)} files" if kinds else "no .jsonl and no .parquet file"
        raise DataError(f"{path} holds {held}: give files, or a directory of one kind.")
    names = Counter(match["split"] for one in found if (match := _SHARD.fullmatch(one.stem)))
    if len(names) > 1:
        first = min(names)
        raise DataError(
            f"{path} holds the splits {', '.join(sorted(names))}: give the files of one, {folder}/{first}-*{kinds[0]}."
        )
    return found


def name_of(paths: list[Path]) -> str:
    """Files of one path, for messages."""
    return str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"


def stamps(paths: list[Path]) -> list[tuple[str, int, int]]:
    """What changes when the files do: names, sizes and times."""
    return [(os.path.realpath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def read_rows(
    path: Path, bad: BadRows, advance: Callable[[int], None] | None = None, columns: list[str] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Row numbers (from 1) and rows as JSON; `advance` hears of every byte of the file once.

    `columns`: those that are wanted, where a file can give some without the others.
    """
    total, told, last = os.path.getsize(path), 0, 0
    for number, line, place in _read(path, bad, columns, total):
        if advance is not None and number - last >= _EVERY:
            advance(place - told)
            told, last = place, number
        yield number, line
    if advance is not None:
        advance(total - told)


def count_of(path: Path) -> int:
    """Rows of a table."""
    return count_rows(path) if path.suffix == ".parquet" else count_arrow(path)


def _read(path: Path, bad: BadRows, columns: list[str] | None, total: int) -> Iterator[tuple[int, bytes, int]]:
    """Rows, with the bytes of the file up to the end of each; those of a table are taken to be of one size."""
    if path.suffix in LINES:
        place = 0
        for number, line in read_lines(path, bad):
            place += len(line)
            yield number, line, place
        return
    rows = count_of(path)
    for number, row in (read_parquet if path.suffix == ".parquet" else read_arrow)(path, columns):
        yield number, json.dumps(row, ensure_ascii=False, default=_bare).encode(), total * number // rows


def _bare(value: Any) -> Any:
    """Values that JSON has not: a date as text, bytes as nothing, for images inside a table are read by nobody here."""
    return None if isinstance(value, bytes) else str(value)


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of one dataset that `save_to_disk` wrote, in its order."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'} is not what the datasets library writes: {error!r}.") from error
    lacking = [file.name for file in files if not file.is_file()]
    if lacking or not files or state.get("_indices_data_files"):
        said = f"{lacking[0]} is absent" if lacking else "its rows are chosen by indices" if files else "it has no file"
        raise DataError(f"{folder}: {said}; save it again with save_to_disk.")
    return files
