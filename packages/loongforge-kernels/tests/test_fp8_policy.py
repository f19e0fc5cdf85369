"""What recorded reports decide: margins, intervals, ranges, merging, and files that are not reports."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from loongforge.kernels.fp8 import GemmShape, Measurement, Policy, Refusal, Report

H200 = "NVIDIA H200"
SHAPE = GemmShape(op="fprop", m=1, n=512, k=256, recipe="blockwise")


def at(m: int, **changes) -> GemmShape:
    return dataclasses.replace(SHAPE, m=m, **changes)


def report(speedups: dict[int, float], *, shape: GemmShape = SHAPE, **changes) -> Report:
    """FP8 takes 1 ms and BF16 the speed-up, at each M."""
    measured = tuple(
        Measurement(shape=dataclasses.replace(shape, m=m), bf16_ms=speedup, fp8_ms=1.0, weight_ms=0.0)
        for m, speedup in speedups.items()
    )
    plain = Report(
        device=H200, torch="2.11.0", triton="3.6.0", date="2026-11-29T10:00:00+00:00", engine="torch",
        emulated=False, micro_batches=1, measurements=measured,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


WINS_LOSES_WINS = {16: 0.8, 128: 1.2, 1024: 0.9, 8192: 1.4}


def test_decisions_between_measured_points():
    policy = Policy.merge(report(WINS_LOSES_WINS))
    geometric = policy.decide(at(round((1024 * 8192) ** 0.5)), H200)
    assert geometric.speedup == pytest.approx((0.9 * 1.4) ** 0.5, rel=1e-3)
    assert geometric.use_fp8
    assert geometric.source == ("between M 1024 and 8192, measured 2026-11-29, torch, torch 2.11.0, triton 3.6.0")
    for m, speedup in WINS_LOSES_WINS.items():
        decision = policy.decide(at(m), H200)
        assert (decision.speedup, decision.use_fp8) == (speedup, speedup > 1)
        assert decision.source.startswith(f"at M {m}, measured")


@pytest.mark.parametrize("seed", range(8))
def test_intervals_are_what_decide_says(seed):
    """Every M of random curves with refusals: intervals and decisions agree, and a segment crosses a margin once."""
    draw = random.Random(seed)
    sizes = sorted(draw.sample(range(1, 400), 6))
    speedups = {m: draw.choice([draw.uniform(0.7, 1.5), 1.03]) for m in sizes}
    refused = draw.choice(sizes) if seed % 2 else None
    one = report({m: value for m, value in speedups.items() if m != refused})
    if refused:
        one = dataclasses.replace(one, refusals=(Refusal(shape=at(refused), reason="no"),))
    policy = Policy.merge(one)
    (curve,) = policy.curves[H200].values()
    inside = {m for part in curve.wins(1.03) for m in range(part.first, part.last + 1)}
    decided = {m: policy.decide(at(m), H200) for m in range(1, 420)}
    assert inside == {m for m, decision in decided.items() if decision.use_fp8}
    for m, decision in decided.items():
        if sizes[0] <= m <= sizes[-1] and decision.speedup is not None:
            ends = [speedups[max(n for n in sizes if n <= m)], speedups[min(n for n in sizes if n >= m)]]
            assert min(ends) <= decision.speedup <= max(ends)
        if m == refused or not sizes[0] <= m <= sizes[-1]:
            assert decision.speedup is None
            assert not decision.use_fp8


def test_growing_speedups_have_one_threshold():
    policy = Policy.merge(report({16: 0.7, 64: 0.9, 512: 1.1, 4096: 1.5}))
    used = [policy.decide(at(m), H200).use_fp8 for m in range(16, 4097)]
    assert used == sorted(used)
    assert 0 < sum(used) < len(used)


def test_a_tie_with_the_margin_is_fp8_all_the_way():
    policy = Policy.merge(report({100: 1.03, 700: 1.03, 701: 1.0299}))
    assert all(policy.decide(at(m), H200).use_fp8 for m in range(100, 701))
    assert not policy.decide(at(701), H200).use_fp8
    assert not Policy.merge(report({100: 1.03}), margin=1.04).decide(at(100), H200).use_fp8


def test_outside_of_what_was_measured_is_bf16():
    policy = Policy.merge(report({64: 2.0, 128: 2.0}))
    for m in (1, 63, 129, 10**6):
        decision = policy.decide(at(m), H200)
        assert (decision.use_fp8, decision.speedup) == (False, None)
        assert decision.source == f"M {m} is outside of 64 to 128, measured"


@pytest.mark.parametrize(
    ("shape", "device", "source"),
    [
        (at(64), "NVIDIA H20", "nothing was measured on NVIDIA H20, only on NVIDIA H200"),
        (at(64, recipe="rowwise"), H200, "recipe rowwise was not measured on NVIDIA H200, only blockwise"),
        (at(64, op="wgrad"), H200, "op wgrad was not measured on NVIDIA H200, only dgrad, fprop"),
        (at(64, n=513), H200, "n 513 was not measured on NVIDIA H200, only 512"),
        (at(64, op="dgrad", k=256), H200, "k 256 was not measured on NVIDIA H200, only 384"),
        (at(64, groups=4), H200, "groups 4 was not measured on NVIDIA H200, only 1"),
        (at(64), "cpu", "times on cpu are emulated and decide nothing"),
    ],
    ids=lambda value: "" if isinstance(value, GemmShape) else value[:12],
)
def test_what_is_unknown_is_bf16_with_the_reason(shape, device, source):
    other = report({64: 2.0}, shape=at(1, op="dgrad", k=384))
    policy = Policy.merge(report({64: 2.0}), other, report({64: 2.0}, device="cpu", emulated=True))
    decision = policy.decide(shape, device)
    assert (decision.use_fp8, decision.speedup, decision.source) == (False, None, source)


def test_a_refusal_decides_for_bf16_and_nothing_is_guessed_beside_it():
    refusals = (Refusal(shape=at(100), reason="M is no multiple of 16"),)
    policy = Policy.merge(report({64: 2.0, 128: 2.0, 256: 2.0}, refusals=refusals))
    used = {m: policy.decide(at(m), H200).use_fp8 for m in (64, 65, 100, 127, 128, 200)}
    assert used == {64: True, 65: False, 100: False, 127: False, 128: True, 200: True}
    assert policy.decide(at(100), H200).source == "M 100 was refused: M is no multiple of 16"


def test_the_newer_of_two_reports_wins():
    old, new = report({64: 2.0, 128: 2.0}), report({64: 0.5}, date="2026-12-01T08:00:00+08:00", torch="2.12.0")
    for policy in (Policy.merge(old, new), Policy.merge(new, old)):
        assert policy.decide(at(64), H200).speedup == 0.5
        assert policy.decide(at(128), H200).speedup == 2.0
        assert "2026-12-01" in policy.decide(at(100), H200).source  # both points have a say in between
        assert "2026-12-01" not in policy.decide(at(128), H200).source
    gone = report({}, date=new.date, refusals=(Refusal(shape=at(64), reason="gone"),))
    assert not Policy.merge(gone, old).decide(at(64), H200).use_fp8
    # The hour counts in the zone that is written: 09:30+08:00 is before 10:00 UTC.
    earlier = report({64: 0.5}, date="2026-11-29T09:30:00+08:00")
    assert Policy.merge(old, earlier).decide(at(64), H200).speedup == 2.0
    assert Policy.merge(old, report({64: 3.0})).decide(at(64), H200).speedup == 3.0  # of one date the later argument


def test_micro_batches_share_the_quantised_weight():
    measured = Measurement(shape=at(64), bf16_ms=1.5, fp8_ms=1.0, weight_ms=1.0)
    one = report({}, measurements=(measured,), micro_batches=4)
    assert Policy.merge(one).decide(at(64), H200).speedup == 1.5 / 1.25
    assert not Policy.merge(one, micro_batches=1).decide(at(64), H200).use_fp8


def test_explained_in_words():
    policy = Policy.merge(report(WINS_LOSES_WINS), report({64: 9.0}, device="cpu", emulated=True))
    header, line, emulated = policy.explain().splitlines()
    assert header.split() == ["device", "recipe", "op", "N", "K", "groups", "FP8", "is", "used"]
    (curve,) = policy.curves[H200].values()
    one, two = curve.wins(policy.margin)
    assert line == (
        f"NVIDIA H200  blockwise  fprop  512  256  1       from M {one.first} to {one.last} (up to 1.20x), "
        f"from M {two.first} to 8192 (up to 1.40x); measured 16 to 8192, 2026-11-29, torch, torch 2.11.0, triton 3.6.0"
    )
    assert emulated.split() == ["cpu", *"-----", "never:", "emulated"]
    assert "never; measured 64 to 64" in Policy.merge(report({64: 0.5})).explain()
    assert "at M 64 (2.00x)" in Policy.merge(report({64: 2.0})).explain()


def test_a_report_survives_its_file(tmp_path: Path):
    whole = report(WINS_LOSES_WINS, refusals=(Refusal(shape=at(7, op="wgrad"), reason="no"),))
    whole.save(tmp_path / "one.json")
    assert Report.load(tmp_path / "one.json") == whole
    report({16: 2.0}, date="2026-12-01T00:00:00+00:00").save(tmp_path / "two.json")
    policy = Policy.load(tmp_path / "two.json", tmp_path / "one.json")
    assert policy.decide(at(16), H200).speedup == 2.0


def spoil(**changes):
    def change(data: dict) -> None:
        data.update(changes)

    return change


def spoil_point(**changes):
    def change(data: dict) -> None:
        data["measurements"][1].update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (spoil(format="something else"), 'no \'"format": "loongforge fp8 report 1"\'; a file that Report.save wrote'),
        (spoil(date="yesterday"), "report: date is 'yesterday', ISO 8601 with a time zone is needed"),
        (spoil(date="2026-11-29T10:00:00"), "ISO 8601 with a time zone"),
        (spoil(emulated="no"), 'report.emulated is "no", true or false is needed'),
        (spoil(micro_batches=0), "micro_batches is 0, 1 or more are needed"),
        (spoil(measurements={}), "report.measurements is {}, a list is needed"),
        (spoil(colour="red"), "report.colour is not known, device, torch"),
        (lambda data: data.pop("device"), "report.device is missing, a text is needed"),
        (spoil_point(fp8_ms=-1.0), r"report.measurements\[1\]: fp8_ms is -1.0, more than 0 milliseconds"),
        (spoil_point(bf16_ms=float("nan")), r"measurements\[1\]: bf16_ms is nan, more than 0"),
        (spoil_point(weight_ms=True), r"measurements\[1\].weight_ms is true, a number is needed"),
        (spoil_point(shape=3), r"measurements\[1\].shape is 3, an object is needed"),
        (spoil_point(shape={}), r"measurements\[1\].shape.op is missing, one of fprop, dgrad, wgrad is needed"),
        (lambda data: data["measurements"][1]["shape"].update(m=0), r"\[1\].shape: GemmShape: m is 0, a whole number"),
        (
            lambda data: data["measurements"][1]["shape"].update(m=16),
            "M 16, N 512, K 256, blockwise stands there twice",
        ),
        (lambda data: data["measurements"][1]["shape"].update(op=[]), r"op is \[\], one of fprop"),
    ],
)
def test_a_corrupt_report_is_refused_by_name(change, text, tmp_path: Path):
    path = tmp_path / "report.json"
    report(WINS_LOSES_WINS).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=text) as caught:
        Report.load(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe"], ids=["empty", "cut", "a list", "no text"])
def test_a_file_that_is_no_report(text, tmp_path: Path):
    path = tmp_path / "report.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"report.json: no.* a file that Report.save wrote is needed"):
        Report.load(path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"op": "forward"}, "op is 'forward', one of fprop, dgrad, wgrad is needed"),
        ({"recipe": "mx"}, "recipe is 'mx', one of tensorwise, rowwise, blockwise is needed"),
        ({"m": 0}, "m is 0, a whole number from 1 on"),
        ({"n": 2.0}, "n is 2.0, a whole number"),
        ({"groups": True}, "groups is True, a whole number"),
    ],
)
def test_shapes_that_are_none(changes, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(SHAPE, **changes)


def test_margins_and_micro_batches_that_are_none():
    with pytest.raises(ValueError, match=r"margin is 0.9, 1 or more is needed"):
        Policy.merge(margin=0.9)
    with pytest.raises(ValueError, match="micro_batches is 0"):
        Policy.merge(micro_batches=0)
    assert Policy.merge().decide(at(1), H200).source == "nothing was measured on NVIDIA H200, only on no device"
