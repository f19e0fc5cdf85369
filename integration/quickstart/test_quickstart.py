"""`loongforge quickstart` as a user types it, with few steps, and what it is made of."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loongforge.core.quickstart.corpus import read_documents, write_corpus
from loongforge.core.quickstart.entropy import unigram_entropy
from loongforge.core.quickstart.questions import read_questions, write_questions
from loongforge.core.quickstart.summary import REQUIRED_SHARE
from loongforge.core.quickstart.training import LAUNCH

STEPS = 4


def quickstart(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LAUNCH, "quickstart", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A quickstart of few steps: everything but the learning."""
    cwd = tmp_path_factory.mktemp("quickstart")
    return cwd, quickstart("--steps", str(STEPS), "--output", "out", "--json", cwd=cwd)


@pytest.mark.slow
class TestRun:
    def test_tells_whether_it_learned(self, finished: tuple[Path, Any]) -> None:
        cwd, done = finished
        summary = json.loads(done.stdout)
        assert summary == json.loads((cwd / "out/summary.json").read_text())
        learned = summary["held_out_loss"] < REQUIRED_SHARE * summary["unigram_entropy"]
        assert summary["passed"] is learned
        assert done.returncode == (0 if learned else 1), done.stderr
        assert learned or "the model learned too little: held-out loss" in done.stderr

    def test_numbers_are_finite_and_plausible(self, finished: tuple[Path, Any]) -> None:
        summary = json.loads((finished[0] / "out/summary.json").read_text())
        names = ("unigram_entropy", "held_out_loss", "sft_held_out_loss", "seconds", "cpu_seconds")
        assert all(math.isfinite(summary[name]) and summary[name] > 0 for name in names), summary
        vocab_size = summary["stages"]["tokenizer"]["vocab_size"]
        assert 4.0 < summary["unigram_entropy"] < math.log(vocab_size)
        assert summary["stages"]["pretrain"]["steps"] == STEPS

    def test_everything_lies_where_the_summary_says(self, finished: tuple[Path, Any]) -> None:
        cwd, _ = finished
        summary = json.loads((cwd / "out/summary.json").read_text())
        assert all((cwd / path).exists() for path in summary["paths"].values())
        assert (cwd / "out/loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    def test_prints_commands_that_can_be_repeated(self, finished: tuple[Path, Any]) -> None:
        said = finished[1].stderr
        assert said.count("$ loongforge train") == 2
        assert "--load out/pretrain/hf" in said
        assert said.count("Q (held out): What does `") == 3

    def test_transformers_reads_the_result(self, finished: tuple[Path, Any]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = finished[0] / "out/model"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.model_type == "qwen3"
        assert model.config.vocab_size == len(tokenizer)
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}], tokenize=False
        )
        assert said == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nThat.<|im_end|>\n"

    def test_a_rerun_takes_up_what_is_finished(self, finished: tuple[Path, Any]) -> None:
        cwd, first = finished
        metrics = cwd / "out/pretrain/metrics.jsonl"
        written = metrics.stat().st_mtime_ns
        again = quickstart("--steps", str(STEPS), "--output", "out", "--json", cwd=cwd)
        assert again.returncode == first.returncode, again.stderr
        assert again.stderr.count("(done before)") == 6
        assert json.loads(again.stdout)["held_out_loss"] == json.loads(first.stdout)["held_out_loss"]
        assert metrics.stat().st_mtime_ns == written


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    refused = quickstart("--output", ".", "--fresh", cwd=tmp_path)
    assert refused.returncode == 2
    assert "not empty and no quickstart" in refused.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "0"], "at least 1, got '0'"),
        (["--nproc-per-node", "3"], "must divide the 4 sequences of a step"),
        (["--stepps", "3"], "unrecognized arguments: --stepps"),
    ],
)
def test_wrong_arguments(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    refused = quickstart(*arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert complaint in refused.stderr
    assert not list(tmp_path.iterdir())


def library(folder: Path) -> Path:
    """Two modules, one of them twice documented, and what must be left out."""
    (folder / "pack/test").mkdir(parents=True)
    (folder / "pack/__init__.py").write_text('"""A pack.\n\nMore of it."""\n')
    (folder / "pack/test/one.py").write_text('"""A test."""\n')
    (folder / "bad.py").write_text("def (:\n")
    method = '    class Copier:\n        def copy(self):\n            """Copy one file to another."""\n'
    again = 'def again():\n    """Copy one file to another."""\n'
    (folder / "copy.py").write_text(f'"""Copy files."""\nif True:\n{method}{again}')
    return folder


def test_documents_have_names_and_come_once(tmp_path: Path) -> None:
    documents = read_documents(library(tmp_path / "library"))
    assert {document.name: document.text for document in documents} == {
        "copy": "Copy files.",
        "copy.Copier.copy": "Copy one file to another.",
        "pack": "A pack.\n\nMore of it.",
    }


def test_what_is_held_out_is_nowhere_in_training(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    folder.mkdir()
    bodies = "".join(f'def f{number}():\n    """Does the thing number {number}."""\n' for number in range(400))
    (folder / "many.py").write_text(bodies)
    documents = read_documents(folder)
    trained, held_out = write_corpus(documents, tmp_path / "corpus")
    assert trained + held_out == 400
    assert 3 < held_out < 25
    write_questions(documents, tmp_path / "questions")
    questions = {part: read_questions(tmp_path / f"questions/{part}.jsonl") for part in ("train", "valid")}
    corpus = (tmp_path / "corpus/train.jsonl").read_text()
    assert len(questions["valid"]) == held_out
    assert all(one.answer not in corpus and one not in questions["train"] for one in questions["valid"])


def test_unigram_entropy_of_a_known_distribution() -> None:
    trained = np.array([0] * 5 + [1])  # with one added to each count: 6, 2, 1 of 9
    expected = -(math.log(6 / 9) + math.log(2 / 9) + math.log(1 / 9)) / 3
    assert unigram_entropy(trained, np.array([0, 1, 2]), 3) == pytest.approx(expected, rel=1e-12)
