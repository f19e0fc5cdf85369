"""What the plan foretells of the encoder in each of its places, and which it advises."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import plan_tiny as tiny
import pytest

from loongforge.core.cli.plan import show
from loongforge.core.plan import Plan, report
from loongforge.core.plan.compute import encoder_flops, flops_per_token
from loongforge.core.plan.images import ImageBudget
from loongforge.core.plan.modes import FLOPS_PER_BYTE, ModeForecast, advise, forecasts, step_time
from loongforge.core.plan.traffic import encoder_exchange

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"

pytestmark = pytest.mark.usefixtures("composition")

LONG = {"seq_length": 4096, "global_batch_size": 16}
"""Two images of 1024 features per sequence."""


def sighted(world: int = 1, **options: Any) -> Plan:
    return Plan.of(tiny.sighted(**options), world)


def parts(plan: Plan) -> tuple[float, float]:
    """Time of a micro-batch on one stage, and of one image on one rank."""
    layout = plan.layout
    stage = flops_per_token(plan) * plan.seq_length / (layout.tp * layout.cp * layout.pp)
    return stage, encoder_flops(plan, ImageBudget.of(plan).grid)


def test_one_rank_loses_nothing():
    plan = sighted(**LONG)
    stage, image = parts(plan)
    length, useful = step_time(plan)
    assert length == useful == pytest.approx(16 * (stage + 2 * image))


def test_inline_every_stage_waits_for_the_first():
    plan = sighted(4, **{PP: 4, "num_layers": 8}, **LONG)
    stage, image = parts(plan)
    length, useful = step_time(plan)
    assert length == pytest.approx(16 * (stage + 2 * image) + 3 * stage)
    assert useful == pytest.approx(19 * stage + 16 * 2 * image / 4)
    # In steady state the share that three of four stages wait is e / (f + e).
    many = sighted(4, **{PP: 4, "num_layers": 8}, **(LONG | {"global_batch_size": 4096}))
    length, useful = step_time(many)
    assert 1 - useful / length == pytest.approx(3 / 4 * 2 * image / (stage + 2 * image), rel=1e-3)


def test_ahead_the_images_of_a_step_are_spread():
    plan = sighted(4, **{PP: 4, "num_layers": 8}, **LONG, enable_full_hetero_dp=True)
    stage, image = parts(plan)
    length, useful = step_time(plan)
    assert length == useful == pytest.approx(32 / 4 * image + 19 * stage)
    # Six images on four ranks take two turns.
    few = sighted(4, **{PP: 4, "num_layers": 8}, **(LONG | {"global_batch_size": 3}), enable_full_hetero_dp=True)
    length, useful = step_time(few)
    assert length - useful == pytest.approx((2 - 6 / 4) * image)


def test_fewer_images_than_ranks_leave_ranks_idle():
    plan = sighted(4, **{TP: 4}, **LONG, enable_encoder_hetero_dp=True)
    length, useful = step_time(plan)
    assert length - useful == pytest.approx(16 * (1 - 2 / 4) * parts(plan)[1])


def test_tensor_parallel_encoders_pay_for_what_they_send():
    plan = sighted(2, **{TP: 2}, **LONG)
    stage, image = parts(plan)
    length, useful = step_time(plan)
    sent = FLOPS_PER_BYTE * encoder_exchange(plan)
    assert sent > 0
    assert length == pytest.approx(16 * (stage + 2 * (image / 2 + sent)))
    assert useful == pytest.approx(16 * (stage + image))


def test_a_wide_encoder_takes_the_images_of_several_replicas():
    plan = sighted(4, **{TP: 2, "encoder": {TP: 4}}, **LONG)
    stage, image = parts(plan)
    sent = FLOPS_PER_BYTE * encoder_exchange(plan)
    assert step_time(plan)[0] == pytest.approx(8 * (stage + 4 * (image / 4 + sent)))


def test_apart_the_slower_side_decides():
    plan = sighted(3, **{PP: 2}, **LONG, encoder_ranks=1)
    stage, image = parts(plan)
    length, useful = step_time(plan)
    assert length == pytest.approx(max(16 * 2 * image, 17 * stage) + 2 * image)
    assert useful == pytest.approx((17 * stage * 2 + 32 * image) / 3)


def test_every_mode_is_foretold_and_this_one_marked():
    modes = forecasts(sighted(8, **{TP: 2, PP: 2}, **LONG, enable_full_hetero_dp=True))
    assert [(mode.name, mode.layout, mode.configured) for mode in modes] == [
        ("homogeneous", "inline tp2 dp2", False),
        ("enable-encoder-hetero-dp", "inline tp1 dp4", False),
        ("enable-full-hetero-dp", "ahead tp1 dp8", True),
        ("encoder-ranks 2", "apart tp1 dp2", False),
    ]
    assert modes[0].step_flops > modes[1].step_flops > modes[2].step_flops
    assert modes[0].idle > modes[1].idle > modes[2].idle == pytest.approx(0)
    assert [mode.ranks for mode in modes] == [8, 8, 8, 10], "an encoder apart has ranks that the foundation has not"


def test_a_size_of_ones_own_stands_beside_the_modes():
    modes = forecasts(sighted(8, **{TP: 4, "encoder": {TP: 2, "data_parallel_size": 4}}, **LONG))
    assert [mode.configured for mode in modes] == [False, False, False, False, True]
    assert (modes[-1].name, modes[-1].layout) == ("as configured", "inline tp2 dp4")


def test_equal_places_are_told_once():
    modes = forecasts(sighted(2, **LONG))
    assert [mode.layout for mode in modes] == ["inline tp1 dp2", "ahead tp1 dp2", "apart tp1 dp2"]


def test_apart_all_modes_have_the_foundation_on_the_same_ranks():
    plan = sighted(6, **{TP: 2, "encoder_ranks": 2}, **LONG)
    modes = forecasts(plan)
    assert [(mode.layout, mode.ranks, mode.configured) for mode in modes] == [
        ("inline tp2 dp2", 4, False), ("inline tp1 dp4", 4, False), ("ahead tp1 dp4", 4, False),
        ("apart tp1 dp2", 6, True),
    ]  # fmt: skip
    others = forecasts(sighted(4, **{TP: 2}, **LONG))
    assert [(mode.layout, mode.step_flops) for mode in others] == [(mode.layout, mode.step_flops) for mode in modes]


def test_a_place_that_cannot_be_had_says_why():
    modes = forecasts(sighted(4, **{CP: 2}, **LONG))
    refused = {mode.name: mode.refused for mode in modes}
    assert refused["homogeneous"] is None
    assert "parallel.encoder_ranks=2 with context_parallel_size=2" in str(refused["encoder-ranks 2"])


def test_advice_spreads_a_heavy_encoder_before_a_pipeline():
    plan = sighted(4, **{PP: 4}, **LONG)
    advice = report(plan).advice
    assert advice is not None
    assert advice.mode == "enable-full-hetero-dp"
    assert "its images are spread over all 4 ranks of a replica" in advice.why


def test_advice_leaves_alone_what_gains_nothing():
    plan = sighted(1, **LONG)
    advice = report(plan).advice
    assert advice is not None
    assert advice.mode == "homogeneous"
    assert advice.why.startswith("no other place makes a step more than 3% shorter, its further ranks counted; ")


def test_advice_for_tensor_parallel_ranks_is_whole_images():
    plan = sighted(2, **{TP: 2}, **LONG)
    advice = report(plan).advice
    assert advice is not None
    assert advice.mode == "enable-encoder-hetero-dp"
    assert "exchange nothing inside the encoder" in advice.why


LEAN = ModeForecast(name="lean", layout="inline tp1", ranks=4, configured=True, step_flops=200, peak_bytes=2**30)
QUICK = ModeForecast(name="quick", layout="apart tp1", ranks=4, configured=False, step_flops=100, peak_bytes=3 * 2**30)


def test_advice_names_the_memory_it_costs():
    advice = advise((LEAN, QUICK), 4)
    assert advice is not None
    assert advice.why == (
        "a step is 50% shorter than lean: on ranks of its own the encoder works while the pipeline does; its fullest "
        "rank needs 2.00 GiB more than the leanest mode's."
    )


def test_advice_counts_the_ranks_that_a_place_takes():
    wide = replace(QUICK, ranks=6)
    advice = advise((LEAN, wide), 4)
    assert advice is not None
    assert advice.why.startswith("a step is 25% shorter than lean, its further ranks counted: on ranks of its own")
    advice = advise((LEAN, replace(QUICK, ranks=8)), 4)
    assert advice is not None
    assert advice.mode == "lean"


def test_advice_fits_into_the_device():
    advice = advise((LEAN, QUICK), 4, 2 * 2**30)
    assert advice is not None
    assert advice.mode == "lean"
    assert advice.why.startswith(
        "no other place is both quicker and small enough; quick would be 50% shorter still but does not fit, unless "
    )
    nothing = advise((LEAN, QUICK), 4, 2**29)
    assert nothing is not None
    assert nothing.mode == "quick"
    assert nothing.why.endswith("; no mode fits into 0.5 GiB.")


def test_table(capsys: pytest.CaptureFixture[str]):
    show(tiny.sighted(**{TP: 2, PP: 2}, **LONG), 8)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1].split()[:3] == ["image_encoder", "inline", "tp2"]
    assert lines[3].split()[:4] == ["foundation", "tp2", "dp2", "pp2"]
    head = lines.index("encoder                   where           ranks   step   lost   GiB")
    assert lines[head + 1].startswith("homogeneous               inline tp2 dp2")
    assert lines[head + 1].endswith("<- this run")
    assert lines[head + 3].split()[:6] == ["enable-full-hetero-dp", "ahead", "tp1", "dp8", "8", "1.00x"]
    assert lines[head + 4].split()[:5] == ["encoder-ranks", "2", "apart", "tp1", "dp2"]
    assert lines[head + 5].startswith("advice     enable-full-hetero-dp: a step is ")
    assert any(line.startswith("assumed    2 images of 1024 features per sequence;") for line in lines)
    assert max(map(len, lines)) <= 120


def test_table_says_what_is_refused(capsys: pytest.CaptureFixture[str]):
    show(tiny.sighted(**{CP: 2}, **LONG), 4)
    out = capsys.readouterr().out
    assert "refused    encoder-ranks 2: parallel.encoder_ranks=2 with context_parallel_size=2" in out


def test_json(capsys: pytest.CaptureFixture[str]):
    show(tiny.sighted(**{TP: 2}, **LONG), 4, as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert [mode["layout"] for mode in data["modes"]] == [
        "inline tp2 dp2", "inline tp1 dp4", "ahead tp1 dp4", "apart tp1 dp2",
    ]  # fmt: skip
    assert data["advice"]["mode"] == "enable-encoder-hetero-dp"
    assert data["components"][0]["mode"] == "inline"
    assert data["encoder_flops_per_step"] == 32 * encoder_flops(sighted(4, **{TP: 2}, **LONG), (1, 64, 64))
    assert data["peak_bytes"] == report(sighted(4, **{TP: 2}, **LONG)).peak_bytes
