"""The benchmark of a step: every side trains the same model, and a side that does not is found out."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from loongforge.ckpt.bench.step.case import REPEAT, Case, Result
from loongforge.ckpt.bench.step.command import cases_of
from loongforge.ckpt.bench.step.devices import peak_of
from loongforge.ckpt.bench.step.gate import differences, distance, reference_of
from loongforge.ckpt.bench.step.planned import calibration_of, keep, planned_lines
from loongforge.ckpt.bench.step.report import rows_of
from loongforge.core.cli import main
from loongforge.core.plan import Plan
from loongforge.core.plan.calibration import Calibration, Work
from loongforge.core.testing import fp32_tolerance, run_distributed

SIDES = ("ours", "transformers", "transformers-autocast", "megatron")
SHAPE = [
    "--num-layers", "3", "--hidden-size", "48", "--ffn-hidden-size", "80", "--num-attention-heads", "6",
    "--num-query-groups", "2", "--kv-channels", "16", "--vocab-size", "131", "--max-position-embeddings", "128",
    "--seq-length", "48", "--steps", "1", "--rounds", "1", "--gate-steps", "5",
]  # fmt: skip
DENSE = ["--model-name", "qwen3-0.6b", *SHAPE]
EXPERTS = [
    "--model-name", "qwen3-30b-a3b", *SHAPE, "--num-experts", "8", "--moe-router-topk", "2",
    "--moe-ffn-hidden-size", "24", "--moe-aux-loss-coeff", "0",
]  # fmt: skip
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]


CASES = {
    "recomputed": ([*DENSE, *RECOMPUTE], "fp32", {"transformers-autocast": "in fp32"}),
    "bf16": (DENSE, "bf16", {}),
    "packed": (
        [*DENSE, "--documents", "3"], "fp32", {"transformers-autocast": "in fp32", "megatron": "no packed rows"}
    ),
    "experts": (EXPERTS, "fp32", {"transformers-autocast": "in fp32"}),
}  # fmt: skip
"""Words, precision, and what a side says that cannot take it."""


def case_of(name: str) -> Case:
    """The case and its precision."""
    words, precision, _ = CASES[name]
    (case,) = cases_of([*words, f"--{precision}"])
    return case


def measured() -> dict[str, dict[str, list[Result]]]:
    """Every side of every case once: what a process of its own would answer."""
    from loongforge.ckpt.bench.step import worker
    from loongforge.core.platform import choose

    device = choose().platform().device(0)
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, list[Result]]] = {name: {} for name in CASES}
    for side, (name, case) in product(SIDES, ((name, case_of(name)) for name in CASES)):
        module, build = worker.SIDES[side]
        build = getattr(import_module(f"loongforge.ckpt.bench.step.{module}"), build)
        found[name][side] = [worker.answer(case, side, build, device)]
    return found


@pytest.fixture(scope="module")
def answers(megatron: Any) -> dict[str, dict[str, list[Result]]]:
    """All of it from one process, forked from here."""
    return run_distributed(lambda _: measured(), 1)[0]


@pytest.mark.parametrize("name", CASES)
def test_all_sides_compute_the_same(name: str, answers: dict[str, dict[str, list[Result]]]) -> None:
    found, (_, precision, unable) = answers[name], CASES[name]
    for side, (result,) in found.items():
        assert not result.failed, result.reason
        assert bool(result.losses) == (side not in unable), result.reason
        assert unable.get(side, "") in result.reason
    assert differences(found, precision) == []
    other = found[reference_of(found) or ""][0]
    worst = {side: distance(result, other) for side, (result,) in found.items() if result.losses}
    if precision == "fp32":
        assert max(max(one) for one in worst.values()) < fp32_tolerance(2e-6), worst  # 2e-7 measured
    else:
        assert min(loss for loss, _ in worst.values() if loss) > 1e-6, "bf16 was used"
    assert other.losses[REPEAT] < other.losses[0] - 0.01, "the same text once more, and it has learned"


@pytest.mark.filterwarnings("ignore")
def test_a_side_with_other_weights_is_found_out(
    megatron: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line, in processes of their own."""
    file = tmp_path / "step.json"
    words = ["--fp32", "--sides", "transformers", "ours", "--threads", "1", "--json", str(file), "--profile"]
    assert main(["bench", "step", *DENSE, *words, "--disturb", "ours"]) == 1
    said, report = capsys.readouterr(), json.loads(file.read_text())
    assert "ours, round 1: losses of the first 5 steps differ by" in said.err
    (case,) = report["cases"]
    assert not case["equal"]
    rows = {row["side"]: row for row in case["rows"]}
    assert rows["transformers"]["ratio"] == pytest.approx(rows["transformers"]["seconds"] / rows["ours"]["seconds"])
    assert rows["ours"]["norm_difference"] > 1e-2 > rows["transformers"]["norm_difference"]
    assert rows["ours"]["mfu"] == pytest.approx(
        case["tflop_per_step"] / rows["ours"]["seconds"] / report["peak"]["tflops"]
    )
    assert "aten::mm" in said.out


def test_a_side_that_lacks_memory_is_a_row() -> None:
    (case,) = cases_of([*DENSE, "--fp32"])
    ran = Result(side="megatron", case=case.label, losses=(5.0, 4.0), norm=2.0, seconds=(0.5, 0.75))
    lacks = Result(side="ours", case=case.label, reason="out of memory: tried to allocate 80 GiB")
    found = {"ours": [lacks], "megatron": [ran, replace(ran, seconds=(0.5, 0.5))]}
    assert differences(found, "fp32") == []
    first, second = rows_of(case, found, peak_of("NVIDIA H200", None, 700.0, "bf16"))
    assert (first.seconds, first.reason) == (None, lacks.reason)
    assert (second.seconds, second.ratio, second.spread) == (0.5, None, 0.5)
    assert second.tokens_per_second == 96.0
    found["megatron"][1] = replace(ran, losses=(5.0, float("nan")))
    assert "megatron, round 2" in differences(found, "fp32")[0]


def test_a_measured_case_calibrates_the_plan(tmp_path: Path) -> None:
    cases = [cases_of([*DENSE, "--bf16", "--num-layers", str(layers)])[0] for layers in (1, 2, 3)]
    sound = []
    for case in cases:
        work = Work.of(Plan.of(case.config, 1))
        took = 1e-9 * (work.matrices + work.attention)
        ran = Result(side="ours", case=case.label, losses=(5.0,), norm=2.0, seconds=(took,), peak_bytes=1 << 30)
        sound.append((case, rows_of(case, {"ours": [ran]}, peak_of("cpu", None, 0.1, "bf16"))))
    found = calibration_of("a device", "2026-11-29", sound)
    assert found is not None
    first, *_, last = planned_lines(found)
    assert first == "plan against ours:"
    assert f"the other cases tell {1e3 * took:.1f} ms (+0.0%)" in last
    assert found.estimate(found.cases[1].work).seconds_error == pytest.approx(0.0, abs=1e-9)
    file = tmp_path / "device.json"
    for part in (replace(found, cases=found.cases[:1]), found):
        keep(part, file)
    assert Calibration.load(file) == found
    keep(replace(found, device="another", cases=found.cases[:1]), file)
    assert len(Calibration.load(file).cases) == 1


def test_the_peak_is_given_known_or_measured() -> None:
    assert peak_of("NVIDIA H100 PCIe", None, 500.0, "bf16").tflops == 756.0
    assert peak_of("NVIDIA H100 80GB HBM3", 800.0, 500.0, "bf16").origin == "given"
    assert peak_of("NVIDIA H200", None, 50.0, "fp32").tflops == 50.0
    assert peak_of("cpu", None, 0.1, "bf16").origin == "measured"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--global-batch-size", "4"], 2, "--global-batch-size"),
        (["--documents", "2", "--micro-batch-size", "2"], 2, "--micro-batch-size 1"),
        (["--tensor-model-parallel-size", "2"], 3, "world=1"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "step", *DENSE, *words]) == code
    assert message in capsys.readouterr().err
