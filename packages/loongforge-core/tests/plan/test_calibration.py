"""Times of a plan are told by measurements, with the error that the measurements themselves show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import plan_tiny as tiny
import pytest

from loongforge.core.cli import plan as verb
from loongforge.core.config import resolve
from loongforge.core.errors import ConfigError
from loongforge.core.plan import Plan
from loongforge.core.plan.calibration import Calibration, Measured, Work
from loongforge.core.plan.compute import flops_per_step

MATRIX, ATTENTION, UPDATE = 2e-15, 5e-15, 3e-11
"""Seconds for each, on a device that has never existed."""


def plan_of(length: int = 128, world: int = 1, **options: Any) -> Plan:
    run = tiny.run(**options)
    return Plan.of(replace(run, train=replace(run.train, seq_length=length)), world)


def took(plan: Plan, factor: float = 1.0) -> Measured:
    work = Work.of(plan)
    seconds = MATRIX * work.matrices + ATTENTION * work.attention + UPDATE * work.update
    return Measured(
        case=str(plan.seq_length), work=work, seconds=factor * seconds,
        peak_bytes=round(1.1 * work.planned_bytes + 3e6),
    )  # fmt: skip


def calibration(*cases: Measured) -> Calibration:
    return Calibration(device="a device", date="2026-11-29", precision="bf16", side="ours", cases=cases)


SHAPES = ((128, 1), (512, 2), (2048, 4), (64, 8), (4096, 1))
"""Sequence length and sequences of a step."""


def cases(**factors: float) -> list[Measured]:
    return [took(plan_of(length, global_batch_size=batch), factors.get(f"of{length}", 1.0)) for length, batch in SHAPES]


def test_work_is_what_the_plan_counts():
    plan = plan_of(512, global_batch_size=4)
    work = Work.of(plan)
    assert work.matrices + work.attention == pytest.approx(flops_per_step(plan))
    packed = Work.of(plan, (0, 128, 512))
    assert packed.matrices == work.matrices
    assert packed.attention == pytest.approx(work.attention * (128**2 + 384**2) / 512**2)
    again = Work.of(
        plan_of(512, global_batch_size=4, recompute_granularity="full", recompute_method="uniform",
                recompute_num_layers=1)
    )  # fmt: skip
    assert again.matrices == pytest.approx(4 / 3 * work.matrices)
    spread = Work.of(plan_of(512, world=4, global_batch_size=4, use_distributed_optimizer=True))
    assert spread.matrices == pytest.approx(work.matrices / 4)
    assert spread.update == pytest.approx(work.update / 4)


@pytest.mark.parametrize("options", [{"latent": tiny.SPARSE}, {"experts": tiny.EXPERTS}], ids=["sparse", "experts"])
def test_every_kind_of_layer_has_work(options: dict[str, Any]):
    plan = plan_of(512, **options)
    assert Work.of(plan).matrices + Work.of(plan).attention == pytest.approx(flops_per_step(plan))
    assert Work.of(plan).attention > 0


def test_a_plan_that_was_not_measured_is_told_by_those_that_were():
    plan = plan_of(1024, global_batch_size=16)
    found = calibration(*cases()).estimate(Work.of(plan))
    assert found.seconds == pytest.approx(took(plan).seconds, rel=1e-6)
    assert found.peak_bytes == pytest.approx(took(plan).peak_bytes, rel=1e-6)
    assert found.seconds_error is not None
    assert found.seconds_error < 1e-6


def test_the_error_is_that_of_the_case_told_worst():
    found = calibration(*cases(of2048=1.3)).estimate(Work.of(plan_of(1024)))
    assert found.seconds_error is not None
    assert 0.15 < found.seconds_error < 1.0


def test_one_case_has_a_rate_and_no_error():
    case = cases()[2]
    found = calibration(replace(case, peak_bytes=None)).estimate(Work.of(plan_of(1024, global_batch_size=4)))
    work = Work.of(plan_of(1024, global_batch_size=4))
    rate = case.seconds / (case.work.matrices + case.work.attention)
    assert found.seconds == pytest.approx(rate * (work.matrices + work.attention))
    assert (found.peak_bytes, found.seconds_error, found.bytes_error) == (None, None, None)


def test_the_footer_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    monkeypatch.setattr(resolve, "resolve", lambda argv: tiny.run())
    file = tmp_path / "device.json"
    measured = calibration(*cases())
    measured = replace(measured, precision=tiny.run().train.precision)
    measured.save(file)
    assert Calibration.load(file) == measured
    assert verb.command(["--calibration", str(file)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    expected = measured.estimate(Work.of(plan_of())).seconds
    assert line.startswith(f"measured   {expected:.3g} s per step without communication (error up to 0%), ")
    assert line.endswith("a device, 2026-11-29, 5 cases of ours")
    assert verb.command(["--calibration", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["seconds"] == pytest.approx(expected)
    replace(measured, precision="fp8").save(file)
    with pytest.raises(ConfigError, match="was measured in fp8"):
        verb.command(["--calibration", str(file)])
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"cannot be read .*bench step --calibrate"):
        verb.command(["--calibration", str(file)])
