"""A balanced run stopped in the middle of an epoch goes on where it was, with any number of ranks and workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loongforge.core.data.balance import Deal
from loongforge.data.cli import command

TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + ':' + message.content + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"""
TOLERANCE = 1e-5
"""Relative, of loss and gradient norm; fp32: the same documents, summed in another order. Measured worst: 4e-7."""


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run on conversations of unequal length, with a tokenizer of 96 letters."""
    path = tmp_path_factory.mktemp("chat")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:96]
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    rows = [
        [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "lo" * (1 + number * number % 24)}]
        for number in range(40)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return ["--sft", "--data-path", str(path / "rows.jsonl"), "--hf-tokenizer-path", str(path), "data.source=chat",
            "--data-cache-path", str(path / "cache"), "--seq-length", "64", "--global-batch-size", "8"]  # fmt: skip


def test_resumed_in_the_middle_with_other_ranks(untied: Any, chat: list[str], tmp_path: Path) -> None:
    balanced = [*chat, "--balance", "analytic"]
    whole = tmp_path / "whole"
    untied.train(whole, [*balanced, "--save-hf"], 4)
    plain = tmp_path / "plain"
    untied.train(plain, chat, 1)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["balance_moved"] for row in rows) > 0
    assert all(1 <= row["balance_ratio"] <= row["balance_before"] for row in rows)
    assert min(row["balance_bound"] for row in rows) >= 1
    assert "balance_ratio" not in (plain / "metrics.jsonl").read_text()

    same = untied.back(whole, tmp_path / "same")
    said = untied.train(same, [*balanced, "--save-hf", "data.num_workers=2"], 4)
    assert "balance_ratio" in said
    untied.same_bits(same, whole)

    fewer = untied.back(whole, tmp_path / "fewer")
    untied.train(fewer, balanced, 2)
    for run in (fewer, plain):
        expected, found = untied.curve(whole), untied.curve(run)
        assert [(row[0], row[3]) for row in found] == [(row[0], row[3]) for row in expected]
        pairs = [
            pair for one, two in zip(expected, found, strict=True) for pair in zip(one[1:3], two[1:3], strict=True)
        ]
        worst = max(abs(one - two) / one for one, two in pairs)
        print(f"worst relative difference {worst:.1e}")
        assert worst < TOLERANCE


def test_costs_from_the_times_of_a_run(untied: Any, chat: list[str], tmp_path: Path, capsys: Any) -> None:
    """Measured, fitted, and dealt by; the times themselves are made up here, for those of a machine depend on it."""
    plain, times, costs = tmp_path / "plain", tmp_path / "times.jsonl", tmp_path / "costs.json"
    words = [*chat, "--balance-times", str(times)]
    untied.train(plain, words, 2)
    about, *rows = [json.loads(line) for line in times.read_text().splitlines()]
    steps = len(untied.curve(plain))
    assert [(row["step"], row["replica"]) for row in rows] == [(n, d) for n in range(2, steps + 1) for d in range(2)]
    assert all(row["tokens"] == 4 * 64 and row["encoder"] == 0 and row["seconds"] > 0 for row in rows)
    assert len({row["squares"] for row in rows}) > 2
    # A file of another model is not written into.
    error = untied.refused(tmp_path / "other", [*words, "--bf16"], 2)
    assert f"{times} does not begin as a file of times of this model and layout does" in error

    generator = np.random.default_rng(0)
    made = []
    for _ in range(40):
        tokens, squares = int(generator.integers(100, 900)), int(generator.integers(10**4, 10**5))
        seconds = 0.1 + 1e-4 * tokens + 3e-6 * squares
        made.append({"tokens": tokens, "squares": squares, "encoder": 0, "seconds": seconds})
    times.write_text("".join(json.dumps(row) + "\n" for row in [about, *made]))
    assert command(["fit-costs", str(times), "--output", str(costs), "--json"]) == 0
    rates = json.loads(capsys.readouterr().out)["rates"]
    assert rates == pytest.approx({"tokens": 1e-4, "squares": 3e-6, "encoder": 0.0}, rel=1e-6)

    run = tmp_path / "run"
    untied.train(run, [*chat, "--balance", "measured", "--balance-costs", str(costs)], 2)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["balance_moved"] for row in rows) > 0
    assert all(1 <= row["balance_ratio"] <= row["balance_before"] for row in rows)
    for one, two in zip(untied.curve(plain), untied.curve(run), strict=True):
        assert two[1:3] == pytest.approx(one[1:3], rel=TOLERANCE)
    other = [*chat, "--tensor-model-parallel-size", "2", "--balance", "measured", "--balance-costs", str(costs)]
    error = untied.refused(tmp_path / "split", other, 2)
    assert "was measured with tp=1, this run has 2: measure this model and layout" in error


def test_a_rank_that_deals_otherwise_stops_all(untied: Any, chat: list[str], tmp_path: Path) -> None:
    """Before the first step is trained."""

    def stray(worker: Any) -> None:
        from loongforge.data.balance.step import StepBalancer

        if worker.rank == 1:
            StepBalancer.__call__ = lambda self, contents: Deal(sequences=self._by_position(contents)[::-1].copy())

    error = untied.refused(tmp_path / "run", [*chat, "--balance", "analytic", "--no-packing"], 2, before=stray)
    assert "ranks [1] have dealt the samples of step 1 otherwise than rank 0" in error
    assert "give every node the same files and the same versions" in error
