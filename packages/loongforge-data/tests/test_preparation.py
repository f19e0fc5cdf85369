"""Preparing data: the command, its worker processes, and several processes that arrive at once."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from loongforge.core import plugins
from loongforge.core.errors import DataError
from loongforge.data.cli import command
from loongforge.data.indexed import IndexedFile
from loongforge.data.once import build_once
from loongforge.data.tokenise import TokenizerChoice, write_documents
from loongforge.data.tokenizer import HFTokenizer, NullTokenizer, Tokenizer, open_tokenizer


def documents_of(prefix: Path) -> list[list[int]]:
    file = IndexedFile(str(prefix))
    starts, ends = file.spans(np.arange(file.documents))
    return [file.read(int(start), int(end - start)).tolist() for start, end in zip(starts, ends, strict=True)]


@pytest.fixture
def corpus(tmp_path: Path, write_rows) -> Path:
    return write_rows(tmp_path / "corpus.jsonl", [{"text": f"hello {n} 数据", "other": f"w{n}"} for n in range(600)])


@pytest.mark.parametrize("workers", [0, 2])
def test_preprocess_writes_rows_in_order(
    workers: int, corpus: Path, tokenizer_dir: Path, tmp_path: Path, capsys
) -> None:
    flags = ["--output", str(tmp_path / "out"), "--hf_tokenizer_path", str(tokenizer_dir), f"--workers={workers}"]
    assert command(["preprocess", str(corpus), *flags, "--append-eod"]) == 0
    tokenizer = HFTokenizer(tokenizer_dir)
    documents = documents_of(tmp_path / "out")
    assert documents == [[*tokenizer.encode(f"hello {n} 数据"), tokenizer.eos_id] for n in range(600)]
    assert f"600 documents, {sum(map(len, documents))} tokens" in capsys.readouterr().out


def test_preprocess_flags(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    base = ["preprocess", str(corpus), "--output", str(tmp_path / "out"), "--hf-tokenizer-path", str(tokenizer_dir)]
    assert command([*base, "--json-keys", "other"]) == 0
    assert documents_of(tmp_path / "out")[3] == HFTokenizer(tokenizer_dir).encode("w3")
    with pytest.raises(DataError, match=r"out.bin exists.*--overwrite"):
        command(base)
    assert command([*base, "--overwrite"]) == 0
    assert documents_of(tmp_path / "out")[3] == HFTokenizer(tokenizer_dir).encode("hello 3 数据")
    (tmp_path / "numbers.txt").write_text("1 2 3")
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10", "--output", str(tmp_path / "null")]
    assert command(["preprocess", str(tmp_path / "numbers.txt"), *null]) == 0
    assert documents_of(tmp_path / "null") == [[1, 2, 3]]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_leave_nothing_behind(workers: int, tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = ['{"text": "fine"}'] * 300 + ["{broken"] + ['{"text": "fine"}'] * 300
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    choice = TokenizerChoice(path=str(tokenizer_dir), kind=None, vocab_size=512)
    with pytest.raises(DataError, match=r"bad.jsonl:301: not JSON"):
        write_documents(
            [tmp_path / "bad.jsonl"], str(tmp_path / "out"), choice, field="text", append_eod=True, workers=workers
        )
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_usage_errors_and_help(capsys) -> None:
    for argv in ([], ["preprocess"], ["preprocess", "x", "--output"]):
        with pytest.raises(SystemExit) as caught:
            command(argv)
        assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    assert caught.value.code == 0
    assert "examples:" in capsys.readouterr().out
    with pytest.raises(DataError, match="no file nowhere"):
        command(["preprocess", "nowhere", "--output", "x"])


def test_inspect_tells_what_a_file_holds(corpus: Path, tokenizer_dir: Path, tmp_path: Path, capsys, write_rows) -> None:
    tokenizer = ["--hf-tokenizer-path", str(tokenizer_dir)]
    command(["preprocess", str(corpus), "--output", str(tmp_path / "out"), *tokenizer])
    capsys.readouterr()
    assert command(["inspect", str(tmp_path / "out"), "--row", "8", *tokenizer]) == 0
    out = capsys.readouterr().out
    assert "600 documents" in out
    assert "hello 7 数据" in out
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]
    chats = write_rows(tmp_path / "chats.jsonl", [{"messages": turns}] * 2)
    assert command(["inspect", str(chats), *tokenizer]) == 0
    out = capsys.readouterr().out
    assert "<|im_start|>assistant\n[[fine<|im_end|>]]" in out
    assert "2 rows" in out
    with pytest.raises(DataError, match="--row 3: there are 2"):
        command(["inspect", str(chats), "--row", "3", *tokenizer])


@pytest.mark.parametrize("builders", [1, 2])
def test_one_builds_while_the_others_wait(builders: int, tmp_path: Path) -> None:
    """Threads stand for processes: a file lock belongs to whoever opened the file. Two builders: two nodes."""
    barrier, target = threading.Barrier(3, timeout=30), tmp_path / "deep" / "built"
    builds: list[int] = []

    def arrive(number: int) -> str:
        def build() -> None:
            builds.append(number)
            time.sleep(0.3)
            target.write_text("whole")

        build_once(target, build, is_builder=number < builders, barrier=barrier.wait)
        return target.read_text()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(arrive, range(3))) == ["whole"] * 3
    assert len(builds) == 1


def test_waiting_processes_learn_that_the_builder_failed(tmp_path: Path) -> None:
    barrier, target = threading.Barrier(2, timeout=30), tmp_path / "built"

    def arrive(is_builder: bool) -> None:
        def build() -> None:
            time.sleep(0.3)
            raise DataError("bad row")

        build_once(target, build, is_builder=is_builder, barrier=barrier.wait)

    with ThreadPoolExecutor(2) as pool:
        builder, waiter = pool.submit(arrive, True), pool.submit(arrive, False)
    with pytest.raises(DataError, match="bad row"):
        builder.result()
    with pytest.raises(DataError, match="built was not built"):
        waiter.result()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--data-cache-path"):
        build_once(tmp_path / "file" / "x", lambda: None, is_builder=True, barrier=lambda: None)


def test_tokenizers(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = HFTokenizer(tokenizer_dir)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    text = "the loong forges models out of text, and this is longer than seven tokens <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.identity() == HFTokenizer(tokenizer_dir).identity()
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="names no end token"):
        _ = HFTokenizer(tmp_path).eos_id
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [4, 2]}))
    other = HFTokenizer(tmp_path)
    assert (other.eos_id, other.pad_id) == (4, 4)
    assert other.identity() != tokenizer.identity()
    size = tokenizer.vocab_size
    extra = {str(size): {"content": "<extra>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": extra}))
    assert HFTokenizer(tmp_path).encode("<extra>") == [size]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        HFTokenizer(tmp_path)
    with pytest.raises(DataError, match="unknown tokenizer type 'GPT2'"):
        open_tokenizer(None, "GPT2", 5)
    null = open_tokenizer(None, "NullTokenizer", 10)
    assert isinstance(null, NullTokenizer)
    assert null.encode("1 2  9") == [1, 2, 9]
    with pytest.raises(ValueError, match="from 0 to 9, found '10'"):
        null.encode("10")


def test_registration_imports_nothing_heavy() -> None:
    assert plugins.load("data", "text").phases == ("pretrain",)
    assert plugins.load("data", "chat").phases == ("sft",)
    assert plugins.load("data", "mock").phases == ()
    code = (
        "import sys; from loongforge.core import plugins; "
        "[p.state() for kind in ('data', 'commands') for ps in plugins.registered(kind).values() for p in ps]; "
        "print(sorted({'torch', 'numpy', 'tokenizers', 'jinja2', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
