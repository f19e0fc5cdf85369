"""The benchmark of kernels runs, says what is wrong, and its figures follow from each other."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from loongforge.kernels.bench import dsa as bench_dsa
from loongforge.kernels.bench.command import command
from loongforge.kernels.bench.dsa_inputs import DIMS, make, tflop
from loongforge.kernels.bench.timing import Row, Timing
from loongforge.kernels.dsa import Shape, Speeds, plan

SMALL = ["--op", "dsa", "--device", "cpu", "--length", "64", "--heads", "2", "--topk", "16", "--repeat", "1"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench_dsa, "CHECKED", 48)


def test_a_report_has_every_part_and_makes_a_table(capsys, tmp_path):
    table = tmp_path / "speeds.json"
    assert command([*SMALL, "--json", "--speeds", str(table), "--peers", "torch, dense causal"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {(row["rival"], row["what"]): row for row in report["rows"]}
    assert {(name, "both") for name in ("ours, masked", "ours, gather", "torch, dense causal")} < set(rows)
    assert rows["torch, dense causal", "both"]["note"] == "another result"
    masked = rows["masked_mha", "forward"]
    assert masked["rate"] == pytest.approx(1e3 * masked["work"] / masked["timing"]["milliseconds"])
    speeds = Speeds.load(table)
    assert speeds.masked_forward == pytest.approx(masked["rate"])
    assert plan(Shape(queries=8192, keys=8192, heads=4, topk=64), speeds).route in ("masked", "gather")


def test_a_wrong_kernel_is_not_measured(monkeypatch, capsys):
    right = bench_dsa.dsa

    def wrong(*args, **named):
        found = right(*args, **named)
        return found._replace(out=found.out.flip(0)) if named["route"] == "gather" else found

    monkeypatch.setattr(bench_dsa, "dsa", wrong)
    assert command(SMALL) == 1
    said = capsys.readouterr()
    assert "gather, output: error ratio" in said.err
    assert "ms" not in said.out


def test_arithmetic_of_the_parts():
    """At 128 heads and 8192 tokens: 4.1 TFLOP gathered forward, 10.3 backward (2176 H and 5504 H for each pair)."""
    inputs = make(DIMS["deepseek_v3_2"], 64, 2, 16, torch.device("cpu"), torch.float32)
    pairs = sum(min(row + 1, 16) for row in range(64))
    assert tflop(inputs, "gather") == pytest.approx(1e-12 * 2176 * 2 * pairs)
    assert tflop(inputs, "gather backward") == pytest.approx(1e-12 * 5504 * 2 * pairs)
    assert tflop(inputs, "masked") == pytest.approx(1e-12 * 2 * 320 * 2 * sum(range(1, 65)))


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, AttributeError])
def test_a_peer_that_fails_leaves_a_reason(kind):
    def greedy(_):
        raise kind("tried to allocate 34 GiB")

    inputs = make(DIMS["glm_5"], 32, 1, 8, torch.device("cpu"), torch.float32)
    row = bench_dsa._whole(inputs, "case", "peer", greedy, 1)
    assert (row.timing, row.note) == (None, "tried to allocate 34 GiB")
    assert replace(row, timing=Timing(milliseconds=2.0, mib=None), work=3.0).rate == 1500
    assert Row(case="", what="", rival="", timing=None, work=1.0).rate is None


@pytest.mark.parametrize(
    "words", [["--repeat", "0"], ["--device", "cuda"], ["--heads", "4", "0"], ["--speeds", "x.json"]]
)
def test_impossible_words_are_refused(words, capsys):
    if words[0] == "--device" and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert command(["--op", "swiglu", *words]) == 2
    assert words[0] in capsys.readouterr().err
