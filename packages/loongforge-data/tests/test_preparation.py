"""Preparing data: the command, its worker processes, and several processes that arrive at once."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loongforge.core import plugins
from loongforge.core.errors import DataError
from loongforge.data.cli import command
from loongforge.data.once import build_once
from loongforge.data.tokenizer import HFTokenizer, NullTokenizer, Tokenizer, open_tokenizer


def test_usage_errors_and_help(capsys) -> None:
    for argv in ([], ["preprocess"], ["preprocess", "x", "--output"]):
        with pytest.raises(SystemExit) as caught:
            command(argv)
        assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    assert caught.value.code == 0
    assert "examples:" in capsys.readouterr().out


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
