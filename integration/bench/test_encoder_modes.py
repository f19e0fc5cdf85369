"""The benchmark of encoder modes: its gate, its clocks, and the exchanges it leaves out are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's modules."""
    monkeypatch.syspath_prepend(str(BENCH))
    import encoder_modes
    import step_clock

    return SimpleNamespace(modes=encoder_modes, clock=step_clock)


def test_modes_of_a_tiny_model_compute_the_same() -> None:
    """The gate passes, features ahead of the pipeline are spread, and the exchange is exact without its detour."""
    command = [sys.executable, str(BENCH / "encoder_modes.py"), "--size", "tiny", "--layout", "tp2", "--steps", "1"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {row["mode"]: row for row in report["modes"]}
    assert set(rows) == {"homogeneous", "(b) data parallel over tp", "(c) ahead", "(c) ahead, offloaded"}
    ahead, offloaded = rows["(c) ahead"], rows["(c) ahead, offloaded"]
    assert ahead["held_kib"] == offloaded["host_kib"]
    assert 0 < ahead["held_kib"] < 0.6 * ahead["gathered_kib"]
    assert offloaded["held_kib"] == ahead["host_kib"] == 0
    assert report["exchange"][0]["difference"] == 0.0
    assert report["exchange"][0]["collectives"] > 0


def test_the_gate_sees_a_rank_that_differs(bench: Any) -> None:
    def ranks(*norms: float) -> list[Any]:
        return [SimpleNamespace(loss=5.0, grad_norm=norm) for norm in norms]

    seen = {("tp4", "homogeneous"): ranks(2.0, 2.0), ("tp4", bench.modes.TEXT): ranks(1.0, 1.0)}
    assert not bench.modes.differences(seen)
    seen["tp4", "(c) ahead"] = ranks(2.0, 2.0 * (1 + 3e-5))
    assert bench.modes.differences(seen) == ["tp4, (c) ahead: grad_norm of the first step is 2.00006, not 2.0."]
    seen["tp4", "(c) ahead"] = ranks(2.0, float("nan"))
    assert bench.modes.differences(seen)


def test_a_collective_ends_with_its_last_rank(bench: Any) -> None:
    event, both = bench.clock.Event, (0, 1)
    logs = [
        [event(1.0, "together", both), event(1.0, "together", both), event(0.5, "end", ())],
        [event(3.0, "together", both), event(0.0, "together", both), event(0.0, "end", ())],
    ]
    seen = bench.clock.replay(logs)
    assert seen.length == 4.5  # 3 for the slower, 1 for the other, and its end
    assert seen.busy == (2.5, 3.0)
    assert seen.idle == pytest.approx(1 - 5.5 / 2 / 4.5)
    assert seen.imbalance == pytest.approx(1 - 5.5 / 2 / 3.0)


def test_a_sender_does_not_wait_and_a_receiver_does(bench: Any) -> None:
    event = bench.clock.Event
    pipeline = [
        [event(1.0, "send", (1,)), event(1.0, "send", (1,)), event(0.0, "end", ())],
        [event(0.0, "receive", (0,)), event(3.0, "receive", (0,)), event(3.0, "end", ())],
    ]
    assert bench.clock.replay(pipeline).length == 7.0
    with pytest.raises(AssertionError, match="missing from the log"):
        bench.clock.replay([pipeline[0][:1], pipeline[1]])


def test_the_least_disturbed_pieces_make_a_step(bench: Any) -> None:
    event, both = bench.clock.Event, (0, 1)
    once = [event(1.0, "together", both), event(5.0, "end", ())]
    again = [event(2.0, "together", both), event(3.0, "end", ())]
    assert bench.clock.quickest_pieces([once, again]) == [once[0], again[1]]
    with pytest.raises(AssertionError, match="exchanges the same"):
        bench.clock.quickest_pieces([once, [event(1.0, "send", (1,)), once[1]]])
