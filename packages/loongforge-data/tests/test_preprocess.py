"""`loongforge data preprocess`: documents in order, from every kind of file, whatever happens to the process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from loongforge.core.errors import DataError
from loongforge.data import documents, parts
from loongforge.data.blend import split_range
from loongforge.data.cli import command
from loongforge.data.documents import write_documents
from loongforge.data.engine import Local
from loongforge.data.indexed import IndexedFile
from loongforge.data.parts import TextRules
from loongforge.data.tokenise import TokenizerChoice
from loongforge.data.tokenizer import HFTokenizer


def documents_of(prefix: Path | str) -> list[list[int]]:
    file = IndexedFile(str(prefix))
    starts, ends = file.spans(np.arange(file.documents))
    return [file.read(int(start), int(end - start)).tolist() for start, end in zip(starts, ends, strict=True)]


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


ROWS = [{"text": f"hello {n} 数据", "other": f"w{n}"} for n in range(600)]


@pytest.fixture
def corpus(tmp_path: Path, write_rows) -> Path:
    return write_rows(tmp_path / "corpus.jsonl", ROWS)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts end in the middle of rows, of letters, and some hold no beginning of a row."""
    monkeypatch.setattr(parts, "PART_BYTES", 37)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_written_in_order(workers: int, corpus: Path, tokenizer_dir: Path, tmp_path: Path, capsys) -> None:
    flags = ["--output", str(tmp_path / "out"), "--hf_tokenizer_path", str(tokenizer_dir), f"--workers={workers}"]
    assert command(["preprocess", str(corpus), *flags, "--append-eod"]) == 0
    tokenizer = HFTokenizer(tokenizer_dir)
    written = documents_of(tmp_path / "out")
    assert written == [[*tokenizer.encode(row["text"]), tokenizer.eos_id] for row in ROWS]
    assert f"600 documents, {sum(map(len, written))} tokens" in capsys.readouterr().out
    assert left_in(tmp_path) == {"corpus.jsonl", "out.bin", "out.idx"}


def test_parts_of_any_size_give_the_same_bytes(tokenizer_dir: Path, tmp_path: Path, monkeypatch, write_rows) -> None:
    corpus = write_rows(tmp_path / "corpus.jsonl", ROWS[:20])
    choice = TokenizerChoice(path=str(tokenizer_dir), kind=None, vocab_size=512)
    sizes = (1, 37, 500, 1 << 22)
    for size in sizes:
        monkeypatch.setattr(parts, "PART_BYTES", size)
        write_documents([corpus], [str(tmp_path / f"out{size}")], TextRules(choice=choice), Local())
    for suffix in ("bin", "idx"):
        assert len({(tmp_path / f"out{size}.{suffix}").read_bytes() for size in sizes}) == 1


def test_flags(corpus: Path, tokenizer_dir: Path, tmp_path: Path, capsys) -> None:
    base = ["preprocess", str(corpus), "--output", str(tmp_path / "out"), "--hf-tokenizer-path", str(tokenizer_dir)]
    assert command([*base, "--json-keys", "other"]) == 0
    assert documents_of(tmp_path / "out")[3] == HFTokenizer(tokenizer_dir).encode("w3")
    with pytest.raises(DataError, match=r"out.bin exists.*--overwrite"):
        command(base)
    capsys.readouterr()
    assert command([*base, "--overwrite", "--json"]) == 0
    written = documents_of(tmp_path / "out")
    assert written[3] == HFTokenizer(tokenizer_dir).encode("hello 3 数据")
    pair = {"prefix": str(tmp_path / "out"), "field": "text", "part": "", "documents": 600}
    told = json.loads(capsys.readouterr().out)
    assert told == {"inputs": [str(corpus)], "pairs": [{**pair, "tokens": sum(map(len, written))}]}
    (tmp_path / "numbers.txt").write_text("1 2 3")
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10", "--output", str(tmp_path / "null")]
    assert command(["preprocess", str(tmp_path / "numbers.txt"), *null]) == 0
    assert documents_of(tmp_path / "null") == [[1, 2, 3]]


@pytest.mark.filterwarnings("ignore")  # megatron-core warns of its own imports and of a rank it does not need
def test_megatron_reads_what_its_own_words_write(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Its flags, its file names, and every document through its reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    words = ["--input", str(corpus), "--output-prefix", str(tmp_path / "my"), "--json-keys", "text", "other"]
    tokenizer_words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer_dir)]
    assert command(["preprocess", *words, *tokenizer_words, "--append-eod", "--workers", "2"]) == 0
    tokenizer = HFTokenizer(tokenizer_dir)
    for key in ("text", "other"):
        read = IndexedDataset(str(tmp_path / f"my_{key}_document"))
        assert len(read) == 600
        assert len(read.document_indices) == 601
        for number, row in enumerate(ROWS):
            assert read[number].tolist() == [*tokenizer.encode(row[key]), tokenizer.eos_id]


def test_one_key_under_an_output_prefix_is_named_as_megatron_does(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    words = ["--input", str(corpus), "--output-prefix", str(tmp_path / "my"), "--hf-tokenizer-path", str(tokenizer_dir)]
    assert command(["preprocess", *words]) == 0
    assert left_in(tmp_path) == {"corpus.jsonl", "my_text_document.bin", "my_text_document.idx"}


def test_parquet_and_arrow_give_what_jsonl_gives(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Row groups and record batches of 7, in worker processes too; a directory of files of rows."""
    table = pyarrow.Table.from_pylist([{"id": n, **row} for n, row in enumerate(ROWS)])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    flags = ["--hf-tokenizer-path", str(tokenizer_dir), "--json-keys", "other", "text"]
    (tmp_path / "saved").mkdir()
    with pyarrow.ipc.new_stream(str(tmp_path / "saved/data.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    (tmp_path / "saved/state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    other, saved = tmp_path / "rows.parquet", tmp_path / "saved"
    for name, path, workers in (("a", corpus, "0"), ("b", other, "0"), ("c", other, "2"), ("d", saved, "2")):
        command(["preprocess", str(path), "--output", str(tmp_path / name), "--workers", workers, *flags])
    for suffix in ("text_document.bin", "text_document.idx", "other_document.bin", "other_document.idx"):
        assert len({(tmp_path / f"{name}_{suffix}").read_bytes() for name in "abcd"}) == 1
    with pytest.raises(DataError, match=r"rows.parquet: no column 'body'; there are 'id', 'text', 'other'"):
        command(["preprocess", str(other), "--output", str(tmp_path / "d"), *flags[:2], "--json-keys", "body"])


def test_a_bad_row_of_parquet_is_named_by_its_number(tokenizer_dir: Path, tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([*ROWS[:10], {"text": None}, *ROWS[:3], {"text": ""}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=4)
    words = ["--output", str(tmp_path / "out"), "--hf-tokenizer-path", str(tokenizer_dir)]
    with pytest.raises(DataError, match=r"parquet:11: field 'text' holds NoneType.*\n.*parquet:15: field 'text' is"):
        command(["preprocess", str(tmp_path / "rows.parquet"), *words])
    assert left_in(tmp_path) == {"rows.parquet"}


@pytest.mark.parametrize("split", ["98,1,1", "50,50", "0,1,3"])
def test_split_writes_the_documents_training_would_take(
    split: str, corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    flags = ["--hf-tokenizer-path", str(tokenizer_dir), "--append-eod"]
    command(["preprocess", str(corpus), "--output", str(tmp_path / "whole"), *flags])
    command(["preprocess", str(corpus), "--output", str(tmp_path / "out"), *flags, "--split", split])
    whole, shares = documents_of(tmp_path / "whole"), split.split(",")
    for part, share in zip(("train", "valid", "test"), [*shares, "0"], strict=False):
        if share == "0":
            assert not (tmp_path / f"out_{part}.idx").exists()
            continue
        first, last = split_range(split, part, 600)
        assert documents_of(tmp_path / f"out_{part}") == whole[first:last]
    assert not [name for name in left_in(tmp_path) if "partial" in name]


def test_a_split_that_leaves_nothing_is_said_and_not_tokenised_again(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    base = ["preprocess", str(corpus), "--output", str(tmp_path / "out"), "--hf-tokenizer-path", str(tokenizer_dir)]
    with pytest.raises(DataError, match="no document for test out of 600"):
        command([*base, "--split", "99999,300,1"])
    monkeypatch.delattr(documents.PartEncoder, "__call__")
    assert command([*base, "--split", "90,5,5"]) == 0
    assert len(documents_of(tmp_path / "out_test")) == 30


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_leave_nothing_behind(workers: int, tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = ['{"text": "fine"}'] * 300 + ["{broken"] + ['{"text": "fine"}'] * 300
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    choice = TokenizerChoice(path=str(tokenizer_dir), kind=None, vocab_size=512)
    with pytest.raises(DataError, match=r"bad.jsonl:301: not JSON"):
        write_documents(
            [tmp_path / "bad.jsonl"], [str(tmp_path / "out")], TextRules(choice=choice), Local(workers=workers)
        )
    assert left_in(tmp_path) == {"bad.jsonl"}


def test_bad_and_empty_lines_are_counted_over_parts(tokenizer_dir: Path, tmp_path: Path, small_parts: None) -> None:
    fine = '{"text": "fine, and so long that it reaches into further parts than one"}'
    lines = [fine, "", "", fine, "{", fine, "  ", fine, '{"text": ""}', fine, "", "", ""]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    rules = TextRules(choice=TokenizerChoice(path=str(tokenizer_dir), kind=None, vocab_size=512))
    with pytest.raises(DataError) as caught:
        write_documents([tmp_path / "bad.jsonl"], [str(tmp_path / "out")], rules, Local())
    named = [int(line.split(":")[1]) for line in str(caught.value).splitlines()[:5]]
    assert named == [2, 3, 5, 7, 9]
    (tmp_path / "good.jsonl").write_text("\n".join([fine, fine, "", "", ""]))
    write_documents([tmp_path / "good.jsonl"], [str(tmp_path / "out")], rules, Local())
    assert len(documents_of(tmp_path / "out")) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from loongforge.data import documents, draft, parts
from loongforge.data.cli import command
parts.PART_BYTES = documents.PART_BYTES = 1000
add, left = draft.Draft.add, [int(sys.argv[1])]
def dying(self, *arguments):
    add(self, *arguments)
    left[0] -= 1
    if not left[0]:
        self._streams[0][0].write(b"torn")
        self._streams[0][0].flush()
        os.kill(os.getpid(), signal.SIGKILL)
draft.Draft.add = dying
command(sys.argv[2:])
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 1000)
    monkeypatch.setattr(documents, "PART_BYTES", 1000)
    flags = [str(corpus), "--hf-tokenizer-path", str(tokenizer_dir), "--json-keys", "text", "other"]
    command(["preprocess", *flags, "--output", str(tmp_path / "whole")])
    words = ["preprocess", *flags, "--output", str(tmp_path / "out")]
    for parts_done in ("3", "4"):
        done = subprocess.run([sys.executable, "-c", KILLED, parts_done, *words], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not list(tmp_path.glob("out*.bin"))
        assert not list(tmp_path.glob("out*.idx"))
    tokenised: list[Any] = []
    plain = documents.PartEncoder.__call__

    def counted(self: Any, part: Any) -> Any:
        tokenised.append(part)
        return plain(self, part)

    monkeypatch.setattr(documents.PartEncoder, "__call__", counted)
    assert command(words) == 0
    assert len(tokenised) == -(-corpus.stat().st_size // 1000) - 7
    for suffix in ("text_document.bin", "text_document.idx", "other_document.bin", "other_document.idx"):
        assert (tmp_path / f"out_{suffix}").read_bytes() == (tmp_path / f"whole_{suffix}").read_bytes()
    assert not [name for name in left_in(tmp_path) if "partial" in name]


def test_a_draft_of_something_else_is_not_continued(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """The file was changed, or other flags were given, since the run was killed."""
    words = ["preprocess", str(corpus), "--hf-tokenizer-path", str(tokenizer_dir), "--output", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", KILLED, "3", *words], check=False)
    assert (tmp_path / "out_text_document.partial").exists() or (tmp_path / "out.partial").exists()
    assert command([*words, "--append-eod"]) == 0
    tokenizer = HFTokenizer(tokenizer_dir)
    assert documents_of(tmp_path / "out") == [[*tokenizer.encode(row["text"]), tokenizer.eos_id] for row in ROWS]


def test_two_writers_of_one_output_are_refused(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    from loongforge.data.draft import Draft

    draft = Draft(str(tmp_path / "out"), 1, np.dtype(np.uint16), "another")
    words = ["preprocess", str(corpus), "--hf-tokenizer-path", str(tokenizer_dir), "--output", str(tmp_path / "out")]
    with pytest.raises(DataError, match=r"another process is writing .*out.partial"):
        command(words)
    draft.close()
    assert command(words) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.jsonl", "--output", "x"], "no file nowhere"),
        (["--output", "x"], "no input"),
        (["a.csv", "--output", "x"], "a.csv: .jsonl, .json, .parquet, .arrow and .txt files"),
        (["a.txt", "--output", "x", "--json-keys", "a", "b"], "one text without keys"),
        (["a.jsonl", "--output", "x", "--json-keys", "a", "a"], "a key comes twice"),
        (["a.jsonl", "--output", "x", "--split", "a"], "three shares"),
        (["a.jsonl", "--output", "x", "--workers", "-1"], "--workers must be 0 or more"),
    ],
)
def test_mistakes_are_said(words: list[str], message: str, tokenizer_dir: Path) -> None:
    with pytest.raises(DataError, match=message):
        command(["preprocess", *words, "--hf-tokenizer-path", str(tokenizer_dir)])
