"""The real command, killed or asked to stop, started again."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from loongforge.core.checkpoint.directory import RunDirectory
from loongforge.core.errors import PREEMPTED_EXIT_CODE

ITERS = 30
FLAGS = ["--train-iters", str(ITERS), "--save-interval", "2", "--save-hf", "true", "--keep-last", "2"]
PATIENCE = 120.0
"""Seconds until a test gives up on a run; one takes about ten on two idle cores."""


@pytest.fixture(scope="module")
def expected(tied: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two processes, never interrupted."""
    run = tmp_path_factory.mktemp("expected") / "run"
    tied.train(run, FLAGS, 2)
    return run


def arguments(source: Path, save: Path, world: int) -> list[str]:
    """The command line of a run."""
    shape = "--fp32 --seq-length 32 --micro-batch-size 1 --global-batch-size 4 --num-workers 0 data.source=mock"
    rates = "--lr 1e-2 --min-lr 1e-3 --weight-decay 0.1 --lr-warmup-iters 2"
    words = [*shape.split(), *rates.split(), *FLAGS, "--nproc-per-node", str(world)]
    return ["--load", str(source), "--save", str(save), *words]


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as the run it is compared with
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # all have ended, as they should
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something the run does."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not come so far"
        time.sleep(0.001)


def steps_done(run: Path) -> int:
    """Lines of metrics.jsonl so far."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def finish(words: list[str]) -> str:
    """Run the command to its end; what it printed."""
    with started(words) as process:
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said
    return said


def test_kill_9_in_a_step_and_in_a_save_then_the_same_command(
    tied: Any, expected: Path, command: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [*command, *arguments(tied.source, run, 2)]
    with started(words) as process:
        until(lambda: steps_done(run) >= 5, process)
        os.killpg(process.pid, signal.SIGKILL)
    seen = RunDirectory(run).steps()[-1]

    def draft() -> bool:
        return any((run / "checkpoints").glob(".step_*.partial/*.distcp"))

    with started(words) as process:
        while True:
            until(lambda: steps_done(run) > seen and draft(), process)
            os.killpg(process.pid, signal.SIGSTOP)
            if draft():
                break
            os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGKILL)
    assert draft()
    latest = RunDirectory(run).latest()
    assert latest is not None
    said = finish(words)
    assert f"from {latest}." in said
    assert [row[0] for row in tied.curve(run)] == list(range(1, ITERS + 1))
    tied.same_bits(run, expected)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == [f"step_{ITERS - 2:08d}", f"step_{ITERS:08d}"]


@pytest.mark.parametrize(("world", "signals", "when"), [(1, 1, "step"), (2, 2, "step"), (2, 1, "before")])
def test_sigterm_saves_and_the_printed_command_finishes_the_run(
    world: int, signals: int, when: str, tied: Any, expected: Path, command: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "a run"  # the printed command must quote it
    with started([*command, *arguments(tied.source, run, world)]) as process:
        # config.yaml is written when the processes have met; model, optimizer and data are made after it
        until(lambda: steps_done(run) >= 3 if when == "step" else (run / "config.yaml").exists(), process)
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == PREEMPTED_EXIT_CODE, said
    done = steps_done(run)
    latest = RunDirectory(run).latest()
    if when == "step":
        assert 3 <= done < ITERS
        assert f"Stopped after step {done}. Go on with: " in said
        assert tied.export(run)
    assert latest == (RunDirectory(run).path(done) if done else None)
    line = next(line for line in said.splitlines() if "Go on with: " in line)
    _, verb, *words = shlex.split(line.split("Go on with: ")[1])
    said = finish([command[0], verb, *words])
    assert f"Resuming at step {done}" in said or not done
    assert [row[0] for row in tied.curve(run)] == list(range(1, ITERS + 1))
    if world == 2:
        tied.same_bits(run, expected)
    else:  # one process adds up the micro-batches in another order than two
        for one, two in zip(tied.curve(run), tied.curve(expected), strict=True):
            assert one[1:3] == pytest.approx(two[1:3], rel=1e-4)
