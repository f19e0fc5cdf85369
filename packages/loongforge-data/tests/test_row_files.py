"""Rows of Parquet files, saved datasets and folders are those of a `.jsonl` file, for every source."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from loongforge.core.errors import DataError
from loongforge.data.chat import open_chat
from loongforge.data.row_files import read_rows, row_files
from loongforge.data.rows import BadRows
from loongforge.data.text import open_text

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"q{number}"},
            *(
                [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "s"}]
                * (number % 2)
            ),
            {"role": "assistant", "content": "forge " * (number % 5 + 1)},
        ],
        "text": f"boat {number} " * (number % 7 + 1),
        "tools": json.dumps([CALL]) if number % 2 else None,
    }
    for number in range(60)
]


def saved(folder: Path, rows: list[dict[str, Any]], files: int = 2) -> Path:
    """As `datasets.Dataset.save_to_disk` writes it: Arrow streams, and a state that names them in order."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    size = -(-len(rows) // files)
    table = pyarrow.Table.from_pylist(rows)
    for number, name in enumerate(names):
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table.slice(number * size, size), max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.fixture
def forms(tmp_path: Path, write_rows) -> dict[str, Path]:
    """The same rows in every form; folders have them in two files."""
    table = pyarrow.Table.from_pylist(ROWS)
    parts = tmp_path / "parts"
    lines = tmp_path / "lines"
    parts.mkdir()
    lines.mkdir()
    for number in range(2):
        chosen = slice(number * 30, number * 30 + 30)
        pyarrow.parquet.write_table(table.slice(number * 30, 30), parts / f"train-0000{number}-of-00002.parquet")
        write_rows(lines / f"{number}.jsonl", ROWS[chosen])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=17)
    with pyarrow.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as file:
        file.write_table(table)
    return {
        "parquet": tmp_path / "rows.parquet",
        "arrow": tmp_path / "rows.arrow",
        "folder of parquet": parts,
        "folder of lines": lines,
        "saved": saved(tmp_path / "saved", ROWS),
    }


@pytest.mark.parametrize("name", ["parquet", "arrow", "folder of parquet", "folder of lines", "saved"])
@pytest.mark.parametrize("source", ["chat", "text"])
def test_samples_equal_those_of_lines(
    name: str, source: str, forms, write_rows, make_request, tokenizer_dir: Path, tmp_path: Path
) -> None:
    template = Path(__file__).with_name("templates") / "thinks.jinja"
    values: dict[str, Any] = {"tokenizer_path": str(tokenizer_dir), "seq_length": 256, "num_samples": 80}
    values |= {"chat_template": str(template), "packing": source == "chat"}
    opened = {"chat": open_chat, "text": open_text}[source]
    lines = write_rows(tmp_path / "rows.jsonl", ROWS)
    expected, found = (
        opened(make_request(tmp_path / "cache", **values, paths=(str(path),))) for path in (lines, forms[name])
    )
    assert expected.report() == found.report()
    for place in range(0, 80, 9):
        for key, value in expected[place].items():
            np.testing.assert_array_equal(found[place][key], value)


def test_bad_rows_of_a_table_are_named(make_request, tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = [*ROWS[:3], {"messages": [], "text": None, "tools": None}]
    file = tmp_path / "bad.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    folder = saved(tmp_path / "saved", rows)
    values: dict[str, Any] = {"tokenizer_path": str(tokenizer_dir)}
    for opened, reason in ((open_chat, "must be a list of messages"), (open_text, "holds NoneType, not text")):
        with pytest.raises(DataError, match=rf"bad\.parquet:4: .*{reason}"):
            opened(make_request(tmp_path / "cache", **values, paths=(str(file),)))
        with pytest.raises(DataError, match=rf"data-00001-of-00002\.arrow:2: .*{reason}"):
            opened(make_request(tmp_path / "cache", **values, paths=(str(folder),)))


def test_what_a_folder_holds_must_be_clear(tmp_path: Path, write_rows) -> None:
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"holds the splits test, train: give the files of one, .*test-\*\.parquet"):
        row_files(tmp_path)
    write_rows(tmp_path / "a.jsonl", ROWS[:1])
    with pytest.raises(DataError, match=r"both \.jsonl and \.parquet files"):
        row_files(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.jsonl and no \.parquet file"):
        row_files(tmp_path / "empty")
    for split in ("test", "train"):
        saved(tmp_path / "both" / split, ROWS[:2])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"holds the splits test, train: give one, .*both/test"):
        row_files(tmp_path / "both")
    train = tmp_path / "both" / "train"
    assert [file.name for file in row_files(train)] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    (train / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow is absent"):
        row_files(train)


def test_progress_hears_of_every_byte_once(forms, write_rows, tmp_path: Path) -> None:
    """Also of a table's, and of values that JSON has not."""
    rows = [{"text": "x" * (number % 9), "day": date(2026, 1, 1), "image": b"\xff"} for number in range(600)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "dated.parquet")
    for path in (write_rows(tmp_path / "many.jsonl", [{"text": "y"}] * 600), tmp_path / "dated.parquet"):
        told: list[int] = []
        found = list(read_rows(path, BadRows(), told.append))
        assert len(found) == 600
        assert sum(told) == path.stat().st_size
        assert len(told) == 3
        assert all(step > 0 for step in told)
    assert json.loads(found[0][1]) == {"text": "", "day": "2026-01-01", "image": None}


def test_a_cut_arrow_file_is_said(forms) -> None:
    file = forms["saved"] / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match="not a readable Arrow file"):
        list(read_rows(file, BadRows()))


def test_epochs_of_every_corpus(write_rows, make_request, tokenizer_dir: Path, tmp_path: Path) -> None:
    """By weight a small corpus is gone through more often than a large one: the report says how often each is."""
    large, small = (write_rows(tmp_path / name, rows) for name, rows in (("l.jsonl", ROWS), ("s.jsonl", ROWS[:20])))
    values: dict[str, Any] = {"tokenizer_path": str(tokenizer_dir), "seq_length": 256, "num_samples": 120}
    values |= {"paths": ("1", str(large), "1", str(small))}
    report = open_chat(make_request(tmp_path / "cache", **values)).report()
    assert report["epochs"] == {str(large): 1.0, str(small): 3.0}
    text = open_text(make_request(tmp_path / "cache", **values)).report()["epochs"]
    assert list(text) == [str(large), str(small)]
    alone = open_text(make_request(tmp_path / "cache", **{**values, "paths": (str(small),), "num_samples": 60}))
    assert text[str(small)] == alone.report()["epochs"]
