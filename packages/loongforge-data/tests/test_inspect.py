"""`loongforge data inspect`: what is there, what is wrong, and what a training would make of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from loongforge.core.errors import DataError
from loongforge.data.cli import command
from loongforge.data.pack import Packs
from loongforge.data.shards import write_shards
from loongforge.data.tokenizer import HFTokenizer
from loongforge.data.tools.forecast import evenness, filling
from loongforge.data.tools.lengths import Lengths


def chat(*said: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)], **more}


@pytest.fixture
def inspect(capsys):
    """Runs the command and returns what it prints; JSON as objects."""

    def run(*words: Any) -> Any:
        assert command(["inspect", *map(str, words)]) == 0
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in words else out

    return run


def test_a_pair_and_conversations_are_shown(inspect, tokenizer_dir: Path, tmp_path: Path, write_rows, capsys) -> None:
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": f"hello {n} 数据"} for n in range(600)])
    tokenizer = ("--hf-tokenizer-path", str(tokenizer_dir))
    command(["preprocess", str(corpus), "--output", str(tmp_path / "out"), *tokenizer])
    capsys.readouterr()
    out = inspect(tmp_path / "out", "--row", "8", *tokenizer, "--seq-length", 10)
    assert "600 documents" in out
    assert "hello 7 数据" in out
    assert "all full" in out
    chats = write_rows(tmp_path / "chats.jsonl", [chat("hello", "fine")] * 2)
    out = inspect(chats, *tokenizer)
    assert "<|im_start|>assistant\n[[fine<|im_end|>]]" in out
    assert "2 rows, 4 turns, 18 bytes of text" in out
    with pytest.raises(DataError, match="--row 3: there are 2"):
        inspect(chats, "--row", "3", *tokenizer)


def test_every_row_is_counted_and_every_bad_one_is_named(inspect, pictures: Path, tmp_path: Path) -> None:
    """Without any tokenizer: structure, and the headers of images and videos."""
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:20])
    (pictures / "text.mp4").write_text("no video")
    rows = [
        chat("<image>?", "0", images=["0.png"]),
        chat("<image>?", "cut", images=["cut.png"]),
        chat("<image> <video>", "both", images=["1.png"], videos=["clip.mp4"]),
        chat("<image>?", "absent", images=["absent.png"]),
        chat("<image>?", "none"),
        chat("<video>", "text", videos=["text.mp4"]),
        {"conversations": []},
        {"text": "naïve"},
    ]
    lines = [*map(json.dumps, rows), "{", "", "[]"]
    (pictures / "rows.jsonl").write_text("\n".join(lines))
    told = inspect(pictures / "rows.jsonl", "--json")
    assert {name: told[name] for name in ("rows", "turns", "images", "videos", "audios")} == {
        "rows": 10, "turns": 4, "images": 2, "videos": 1, "audios": 0,
    }  # fmt: skip
    assert told["text_bytes"] == len("?") + len("0") + len(" ") + len("both") + len("naïve".encode())
    bad = {row["row"]: row["reason"] for row in told["bad"]}
    assert set(bad) == {2, 4, 5, 6, 7, 9, 11}
    for row, reason in ((2, "not a readable image"), (4, "no such file"), (6, "not a readable video"), (9, "not JSON")):
        assert reason in bad[row]
    assert f"{pictures}/rows.jsonl:4: image {pictures}/absent.png: there is no such file" in inspect(
        pictures / "rows.jsonl"
    )


def test_shards_are_read_as_far_as_they_go(inspect, pictures: Path, tmp_path: Path) -> None:
    def sample(key: str, image: bytes) -> tuple[str, dict[str, bytes]]:
        return key, {"json": json.dumps(chat("<image>?", key)).encode(), "png": image}

    fine = (pictures / "3.png").read_bytes()
    samples = [sample(f"k{n}", b"broken" if n == 4 else fine) for n in range(9)]
    shards = write_shards(samples, tmp_path / "shards", maxcount=3)
    os.truncate(shards[2], shards[2].stat().st_size // 2)
    told = inspect(tmp_path / "shards", "--json")
    named = {row["row"] for row in told["bad"]}
    assert "k4" in named
    assert [row["path"] for row in told["bad"] if row["row"] == "the rest"] == [str(shards[2])]
    assert told["rows"] == told["images"] + len(named)
    assert told["images"] >= 5


def test_parquet_holds_what_jsonl_holds(inspect, tokenizer_dir: Path, tmp_path: Path, write_rows) -> None:
    rows = [chat("hello " * n, "fine", "and?", "done") for n in range(1, 30)]
    write_rows(tmp_path / "rows.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=4)
    flags = ("--hf-tokenizer-path", tokenizer_dir, "--seq-length", 64, "--json")
    one, two = inspect(tmp_path / "rows.jsonl", *flags), inspect(tmp_path / "rows.parquet", *flags, "--workers", 2)
    assert {**one, "paths": 0} == {**two, "paths": 0}
    assert one["turns"] == 4 * 29


def test_lengths_packing_and_balance(inspect, tokenizer_dir: Path, tmp_path: Path, write_rows) -> None:
    tokenizer = HFTokenizer(tokenizer_dir)
    generator = np.random.default_rng(0)
    texts = ["hello " * int(n) for n in generator.integers(1, 40, 200)]
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    flags = ("--hf-tokenizer-path", tokenizer_dir, "--seq-length", 100, "--dp", "2,8", "--micro-batches", 2)
    told = inspect(rows, *flags, "--png", tmp_path / "lengths.png", "--json")
    lengths = np.array([len(tokenizer.encode(text)) for text in texts])
    assert told["lengths"]["total"] == lengths.sum()
    assert (told["lengths"]["shortest"], told["lengths"]["longest"]) == (lengths.min(), lengths.max())
    fits = lengths[lengths <= 101] - 1
    packs = Packs.fit(fits, 100)
    assert told["packing"]["packed"] == len(packs) >= told["packing"]["bound"] >= fits.sum() / 100
    assert told["packing"]["filled"] == pytest.approx(fits.sum() / 100 / len(packs), abs=1e-4)
    assert told["packing"]["overlong"] == (lengths > 101).sum()
    for row in told["balance"]["layouts"]:
        assert row["as_loaded"] >= row["balanced"] >= row["bound"] >= 1
    with Image.open(tmp_path / "lengths.png") as image:
        assert image.format == "PNG"
        assert image.size == (1080, 540)
    text = inspect(rows, *flags)
    assert f"{len(packs)} packed sequences" in text
    assert f"{told['balance']['layouts'][1]['as_loaded']:.3f}" in text


def test_histogram_counts_every_length() -> None:
    lengths = np.array([0, 1, 1, 5, 8, 9, 1000])
    found = Lengths.of(lengths)
    assert sum(counted for *_, counted in found.histogram) == 7
    for first, last, counted in found.histogram:
        assert counted == ((lengths >= first) & (lengths <= last)).sum()
    assert (found.median, found.percentile_90, found.percentile_99) == (5, 1000, 1000)
    assert Lengths.of(np.array([7])).histogram == [(4, 7, 1)]


def test_evenness_of_known_steps() -> None:
    """Rows fill a sequence each, so ranks differ by what their sequences cost."""
    sizes = np.full(4, 10)
    even = evenness(sizes, np.ones(4), 10, micro_batches=1, ranks=[1, 2, 4])
    assert [(row.as_loaded, row.balanced, row.bound) for row in even] == [(1, 1, 1)] * 3
    # One row costs as much as the other three: every step of four ranks has it once, the busiest has half of all.
    costs = np.array([3.0, 1, 1, 1])
    (one,) = evenness(sizes, costs, 10, micro_batches=1, ranks=[4])
    assert (one.as_loaded, one.balanced, one.bound) == (2, 2, 2)
    # Two ranks with two each: dealt anew, 4 of 3 on the mean; as loaded, in a third of the orders no worse.
    (two,) = evenness(sizes, costs, 10, micro_batches=2, ranks=[2])
    assert two.balanced == two.as_loaded == pytest.approx(4 / 3, abs=1e-4)
    # Four small rows in a sequence move alone: dealt anew, each rank has one dear row; as loaded one often has both.
    small = evenness(np.full(8, 5), np.array([9.0, 9, 1, 1, 1, 1, 1, 1]), 10, micro_batches=2, ranks=[2])
    assert small[0].balanced == pytest.approx(1, abs=1e-4)
    assert small[0].as_loaded > 1.2


def test_filling_counts_what_is_longer() -> None:
    found = filling(np.array([101, 102, 51, 51, 2]), 100)
    assert (found.overlong, found.unpacked, found.packed, found.bound) == (1, 4, 3, 3)
    assert found.filled == pytest.approx(201 / 300, abs=1e-4)


def test_mistakes_are_said(inspect, pictures: Path, tokenizer_dir: Path, tmp_path: Path, write_rows) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat("hello", "fine")])
    for words, message in (
        ((tmp_path / "absent.jsonl",), "no file"),
        ((rows, "--seq-length", 10), "no length is known"),
        ((rows, "--png", "x.png"), "no length is known"),
        ((rows, "--dp", "8"), "--dp needs --seq-length"),
        ((rows, "--seq-length", 0), "--seq-length must be 1 or more"),
        ((rows, "--max-pixels", 5), "unknown arguments: --max-pixels 5"),
        ((rows, "--row", 1), "--row shows conversations"),
        ((tmp_path / "rows", tmp_path / "rows"), "one .bin/.idx pair"),
    ):
        with pytest.raises(DataError, match=message):
            inspect(*words)
    shutil.copy(pictures / "0.png", tmp_path / "0.png")
    write_rows(tmp_path / "seen.jsonl", [chat("<image>?", "0", images=["0.png"]), chat("hello", "fine")])
    out = inspect(tmp_path / "seen.jsonl", "--hf-tokenizer-path", tokenizer_dir)
    assert "1 rows with media have no length" in out
