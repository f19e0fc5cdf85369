"""Parquet files give the rows that were written, one by one, and say what is wrong with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from loongforge.core.errors import DataError
from loongforge.data.parquet import count_rows, read_parquet

ROWS: list[dict[str, Any]] = [
    {"text": "one", "messages": [{"role": "user", "content": "hello"}], "number": 1},
    {"text": None, "messages": [{"role": "assistant", "tool_calls": [{"name": "look", "at": {"x": 1}}]}], "number": 2},
    {"text": "数据", "messages": [{"role": "tool", "content": None}, {"role": "user", "content": ""}], "number": 3},
]


def written(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def test_rows_come_back_in_order_over_row_groups(tmp_path: Path) -> None:
    """Nested objects have the fields that were written; a column that holds nothing is there as None."""
    path = written(tmp_path / "rows.parquet", ROWS * 700, row_group_size=1000)
    rows = list(read_parquet(path))
    assert [number for number, _ in rows] == list(range(1, 2101))
    expected = [dict(ROWS[0]), dict(ROWS[1]), {**ROWS[2], "messages": [{"role": "tool"}, ROWS[2]["messages"][1]]}]
    assert [row for _, row in rows] == expected * 700
    assert count_rows(path) == 2100


def test_only_the_columns_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", ROWS)
    assert [row for _, row in read_parquet(path, ["number"])] == [{"number": 1}, {"number": 2}, {"number": 3}]
    with pytest.raises(DataError, match=r"no column 'body'; there are 'text', 'messages', 'number'"):
        next(read_parquet(path, ["body"]))


def test_a_file_that_is_no_parquet_or_is_cut(tmp_path: Path) -> None:
    whole = written(tmp_path / "rows.parquet", ROWS * 50).read_bytes()
    for name, content in (("text.parquet", b"hello"), ("cut.parquet", whole[: len(whole) // 2]), ("no.parquet", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: not a readable Parquet file"):
            list(read_parquet(tmp_path / name))
    with pytest.raises(DataError, match=r"no file .*absent\.parquet"):
        next(read_parquet(tmp_path / "absent.parquet"))


def test_damage_inside_is_said(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", [{"text": f"row {number} " * 20} for number in range(5000)])
    content = bytearray(path.read_bytes())
    content[1000:3000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file"):
        list(read_parquet(path))


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "rows.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"need pyarrow: pip install 'loongforge-data\[parquet\]'"):
        next(read_parquet(path))
