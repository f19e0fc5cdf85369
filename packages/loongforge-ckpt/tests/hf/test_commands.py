"""`loongforge verify` and `loongforge convert` as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loongforge.ckpt.convert.command import command as convert
from loongforge.ckpt.verify.command import command as verify
from loongforge.ckpt.verify.difference import Difference, Side, differences
from loongforge.core.errors import CheckpointError, ConfigError

MEASURED = 3e-6
"""Worst relative difference seen over five tiny models and layouts (tp2 with sp, pp2, cp2, dp2): 2.9e-6."""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from loongforge.core.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *words],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.parametrize(
    ("tied", "layout"),
    [
        (False, ()),
        (True, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    ],
    ids=["one rank", "tp2 sp"],
)
def test_verify_finds_logits_loss_and_every_gradient_equal(
    make_hf: Callable[..., Path], tied: bool, layout: tuple[str, ...]
) -> None:
    source = make_hf(tied)
    done = run("verify", str(source), "--json", "--seq-length", "24", "--make-vocab-size-divisible-by", "1", *layout)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    names = {f"grad {name}" for name in load_file(source / "model.safetensors")}
    assert told["differences"].keys() == {"logits", "loss", *names}
    assert max(one["relative"] for one in told["differences"].values()) < 10 * MEASURED


def test_verify_says_which_tensor_differs() -> None:
    gradients = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([4.0]), "tiny": torch.tensor([1e-9])}
    right = Side(loss=2.0, logits=torch.ones(1, 2, 3), gradients=gradients)
    left = Side(
        loss=2.0,
        logits=torch.ones(1, 2, 3) * 1.5,
        gradients={"a": torch.tensor([1.0, -2.2]), "tiny": torch.tensor([3e-9]), "more": torch.tensor([0.0])},
    )
    found = {one.name: one.worst for one in differences(left, right)}
    assert found["grad b"] == found["grad more"] == float("inf")
    assert found["logits"] == 0.5
    assert found["grad a"] == pytest.approx(0.1)
    assert found["loss"] == 0
    assert found["grad tiny"] == pytest.approx(2e-9 / 4e-4)
    blind = Side(loss=float("nan"), logits=right.logits, gradients=gradients)
    assert differences(blind, right)[0].name == "loss"
    assert differences(blind, right)[0].worst == float("inf")


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_exits_with_1_above_the_tolerance(
    as_json: bool, make_hf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Difference(name="logits", worst=3e-5, absolute=1e-4), Difference(name="loss", worst=0.0, absolute=0.0)]
    monkeypatch.setattr("loongforge.ckpt.verify.command.compare", lambda config, directory: found)
    words = [str(make_hf(False)), *(["--json"] if as_json else [])]
    assert verify([*words, "--tolerance", "1e-4"]) == 0
    assert verify([*words, "--tolerance=1e-5"]) == 1
    said = capsys.readouterr().out
    assert ('"passed": false' if as_json else "DIFFERENT: worst 3.00e-05 (logits)") in said


def test_a_file_is_no_place_for_a_checkpoint(make_hf: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: is not an empty directory"):
        convert([str(make_hf(False)), str(tmp_path / "file")])


@pytest.mark.parametrize("command", [convert, verify])
def test_help_has_examples(command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--help"]) == 0
    assert "\nexamples:\n" in capsys.readouterr().out


def test_convert_there_and_back_bitwise(make_hf: Callable[..., Path], tmp_path: Path) -> None:
    source = make_hf(True, torch.bfloat16)
    done = run("convert", str(source), str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/checkpoints/step_00000000/manifest.json").read_text())["precision"] == "bf16"
    done = run("convert", str(tmp_path / "run"), str(tmp_path / "back"), "--tensor-model-parallel-size", "2")
    assert done.returncode == 0, done.stderr
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)) for name, tensor in before.items())
    assert after["model.norm.weight"].dtype == torch.bfloat16
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    done = run("convert", str(source), str(tmp_path / "run"))
    assert done.returncode == CheckpointError.exit_code
    assert "is not an empty directory. Choose a new one" in done.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["/nowhere", "x"], "convert: no directory '/nowhere'"),
        (["only-one"], "two directories are needed"),
        ([".", "."], "SRC and DST are the same directory"),
    ],
)
def test_convert_refusals(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        convert(words)


def test_verify_refusals(make_hf: Callable[..., Path]) -> None:
    source = str(make_hf(False))
    with pytest.raises(ConfigError, match="no directory '/nowhere'"):
        verify(["/nowhere"])
    with pytest.raises(ConfigError, match="--tolerance: must be a number, got 'small'"):
        verify([source, "--tolerance", "small"])
    with pytest.raises(ConfigError, match="leave out --use-distributed-optimizer"):
        verify([source, "--use-distributed-optimizer"])
    with pytest.raises(ConfigError, match="the first argument is the Hugging Face directory"):
        verify(["--json", source])


def test_convert_names_a_damaged_file(make_hf: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((make_hf(False) / "config.json").read_bytes())
    save_file({"a": torch.zeros(3)}, source / "model.safetensors")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or corrupt"):
        convert([str(source), str(tmp_path / "out")])
