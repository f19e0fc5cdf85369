"""Caches and packs made before a run are those that the run reads; models are named, none is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loongforge.core.config import resolve
from loongforge.core.data.ahead import open_ahead
from loongforge.core.errors import DataError
from loongforge.core.plan import Plan
from loongforge.data import chat, sequences, vlm
from loongforge.data.cli import command

MARKS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONG = 37
"""Row of `chats.jsonl` that fits into no sequence."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes, `chats.jsonl`, and `seen.jsonl` with pictures."""
    folder = tmp_path_factory.mktemp("files")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    (folder / "tokenizer").mkdir()
    backend.save(str(folder / "tokenizer/tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    for name, count, image in (("chats.jsonl", 60, False), ("seen.jsonl", 20, True)):
        rows: list[dict[str, Any]] = []
        for number in range(count):
            asked = {"role": "user", "content": "<image>" * image + "?" * (900 if number == LONG - 1 else number % 17)}
            rows.append({"messages": [asked, {"role": "assistant", "content": "." * (1 + number % 5)}]})
            if image:
                Image.new("RGB", (64 + 32 * (number % 3), 64)).save(folder / f"{number}.png")
                rows[-1]["images"] = [f"{number}.png"]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(files: Path, data: str, *more: object) -> list[str]:
    """What `train` is told, but for the cache."""
    model = "qwen3_vl_2b" if data == "seen.jsonl" else "qwen3_0_6b"
    told = ["--model-name", model, "--training-phase", "sft", "--data-path", files / data, "--train-iters", 3]
    return [str(word) for word in (*told, "--hf-tokenizer-path", files / "tokenizer", "--seq-length", 256, *more)]


def opened(argv: list[str]) -> Any:
    """The training data of a run of one rank."""
    return open_ahead(Plan.of(resolve.resolve(argv), 1))[0].train


@pytest.mark.parametrize("data", ["chats.jsonl", "seen.jsonl"])
def test_a_run_finds_all_in_the_cache(
    data: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words(files, data, "--data-cache-path", tmp_path / "cache", "--split", "90,10", "--eval-iters", 1)
    assert command(["cache", *argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cache"] == [str(tmp_path / "cache")]
    assert [report["part"] for report in told["data"]] == ["train", "valid"]
    for module, name in ((chat, "write_conversations"), (vlm, "write_visual"), (sequences.Packs, "fit")):
        monkeypatch.delattr(module, name)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert opened(argv)[0]["loss_mask"].sum() > 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    with pytest.raises(NameError):  # and it would have noticed
        opened([*argv, "--seq-length", "128"])


@pytest.mark.parametrize("data", ["chats.jsonl", "seen.jsonl"])
def test_packs_are_written_down_as_training_reads_them(
    data: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words(files, data, "--overlong", "drop", "--no-shuffle")
    assert command(["pack", "--output", str(tmp_path / "out"), *argv, "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    plan = [json.loads(line) for line in (tmp_path / "out/pack_plan.jsonl").read_text().splitlines()]
    left = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    rows = len((files / data).read_text().splitlines())
    packed = [tuple(row) for pack in plan for row in pack["rows"]]
    dropped = [(note["path"], note["row"]) for note in left]
    assert sorted([*packed, *dropped]) == [(str(files / data), number + 1) for number in range(rows)]
    assert dropped == ([(str(files / data), LONG)] if data == "chats.jsonl" else [])
    assert account["rows"] == rows == account["conversations"] + len(left)
    assert account["bound"] <= account["packs"] == len(plan)
    assert json.loads((tmp_path / "out/packing.json").read_text()) == account
    source = opened([*argv, "--data-cache-path", str(tmp_path / "out")])
    for number, pack in enumerate(plan):
        sample = source[number]
        lengths = np.diff(sample["cu_seqlens"])
        assert lengths[: len(pack["lengths"])].tolist() == pack["lengths"]
        assert pack["total"] == sum(pack["lengths"]) <= 256
        for (_, row), start in zip(pack["rows"], np.cumsum([0, *lengths]), strict=False):
            assert asked(sample, int(start)) == (row - 1) % 17


def asked(sample: Any, start: int) -> int:
    """Question marks of the conversation that begins at a position: they tell rows apart."""
    ends = [*sample["cu_seqlens"].tolist()]
    end = ends[ends.index(start) + 1]
    return int((sample["tokens"][start:end] == sorted(pre_tokenizers.ByteLevel.alphabet()).index("?")).sum())


def test_split_rows_and_held_out_ones_are_accounted_for(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words(files, "chats.jsonl", "--overlong", "split", "--split", "80,20")
    assert command(["pack", "--output", str(tmp_path / "out"), *argv, "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert account["rows"] == 60 == account["conversations"] + account["held_out"] + sum(account["left_out"].values())
    assert account["held_out"] == 12


def test_what_cannot_be_packed_is_said(files: Path, tmp_path: Path) -> None:
    out = ["pack", "--output", str(tmp_path / "out")]
    with pytest.raises(DataError, match="nothing to pack"):
        command([*out, *words(files, "chats.jsonl", "--no-packing")])
    with pytest.raises(DataError, match="give that one alone"):
        command([*out, *words(files, "chats.jsonl", "--data-cache-path", "x")])
    with pytest.raises(DataError, match="--world must be 1 or more"):
        command([*out, *words(files, "chats.jsonl"), "--world", "0"])


def test_a_pack_plan_that_lacks_a_row_is_an_error(files: Path, tmp_path: Path) -> None:
    """The cache is changed behind the back of the command: a note is gone."""
    argv = ["pack", "--output", str(tmp_path / "out"), *words(files, "chats.jsonl", "--overlong", "drop")]
    assert command(argv) == 0
    (note,) = (tmp_path / "out").glob("chats-*/dropped.jsonl")
    note.unlink()
    (tmp_path / "out/pack_plan.jsonl").unlink()
    with pytest.raises(DataError, match="rows make 60 conversations and 59 are packed"):
        command(argv)
    assert not (tmp_path / "out/pack_plan.jsonl").exists()


def test_images_are_measured_by_the_model_that_is_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model-name", "qwen3_vl_2b", "--hf-tokenizer-path", str(files / "tokenizer"), "--seq-length", "256"]
    assert command(["inspect", str(files / "seen.jsonl"), *model, "--dp", "2", "--micro-batches", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (files / "cache").mkdir(exist_ok=True)
    report = opened(words(files, "seen.jsonl", "--data-cache-path", files / "cache")).report()
    assert told["lengths"]["total"] == report["tokens"]
    assert told["packing"]["packed"] == report["sequences"]
    assert told["balance"]["cost"] == "FLOPs of the model"
    assert told["balance"]["layouts"][0]["balanced"] >= 1
