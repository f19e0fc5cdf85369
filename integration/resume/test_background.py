"""Saves behind the training: killed, failed, completed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from loongforge.core.checkpoint.directory import RunDirectory


def _hold(step: int) -> None:
    """Let the background writer of one step wait before it writes."""
    from loongforge.core.checkpoint import write

    real = write.Plan.write

    def slow(self: Any) -> Any:
        if f"step_{step:08d}" in str(self.writer.checkpoint_dir):
            time.sleep(120)
        return real(self)

    write.Plan.write = slow


def test_killed_while_writing_behind_leaves_the_previous_checkpoint_and_no_process(
    tied: Any, whole: Path, tmp_path: Path
) -> None:
    run = tied.back(whole, tmp_path / "run")
    config = tied.config(run, ["--async-save"])

    def work() -> None:
        from loongforge.core.run import train

        _hold(6)
        train(config)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    try:
        assert process.pid
        parent = psutil.Process(process.pid)
        deadline = time.monotonic() + 60
        while not (writers := parent.children()):
            assert time.monotonic() < deadline
            assert process.is_alive()
            time.sleep(0.01)
        assert RunDirectory(run).draft(6).is_dir()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        gone, alive = psutil.wait_procs(writers, timeout=10)
        assert gone
        assert not [writer for writer in alive if writer.status() != psutil.STATUS_ZOMBIE]
    finally:
        process.kill()
        process.join()
    assert RunDirectory(run).steps() == [3]
    assert "Resuming at step 3" in tied.train(run, ["--async-save"])
    assert tied.curve(run) == tied.curve(whole)
    assert RunDirectory(run).steps() == [3, 6]


def test_a_failed_writer_stops_the_run_at_the_next_poll(tied: Any, tmp_path: Path) -> None:
    def die(worker: Any) -> None:
        from loongforge.core.checkpoint import write

        if worker.rank == 1:
            write.Plan.write = lambda self: os._exit(9)  # as the out-of-memory killer would

    flags = ["--async-save", "--train-iters", "300", "--tensor-model-parallel-size", "2"]
    error = tied.refused(tmp_path / "run", flags, 2, before=die)
    assert error.startswith("CheckpointError: cannot write a checkpoint below ")
    assert "rank 1: RuntimeError: the background writer ended with exit code 9" in error
    assert "No complete checkpoint exists yet." in error
    assert 3 < len(tied.curve(tmp_path / "run")) < 300


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_does_not_reach_the_writer(number: int, tied: Any, tmp_path: Path) -> None:
    def interrupt(worker: Any) -> None:
        from loongforge.core.checkpoint import write

        real = write.Plan.write

        def write_and_signal(self: Any) -> Any:
            for _ in range(2):
                os.kill(os.getpid(), number)
            return real(self)

        write.Plan.write = write_and_signal

    said = tied.train(tmp_path / "run", ["--async-save"], before=interrupt)
    run = RunDirectory(tmp_path / "run")
    assert run.steps() == [3, 6]
    assert all(f"Checkpoint: {run.path(step)}\n" in said for step in (3, 6))


def test_a_loss_that_is_not_finite_does_not_lose_the_checkpoint_before(tied: Any, tmp_path: Path) -> None:
    """At this rate weights overflow within two updates; the third step stops while the state after them is written."""

    def slow(_: Any) -> None:
        from loongforge.core.checkpoint import write

        real = write.Plan.write

        def later(self: Any) -> Any:
            time.sleep(1)
            return real(self)

        write.Plan.write = later

    run = tmp_path / "run"
    error = tied.refused(run, ["--async-save", "--save-interval", "1", "--lr", "1e30"], before=slow)
    assert error.startswith("TrainingError: ")
    assert "at step 3" in error
    assert RunDirectory(run).steps() == [1, 2]
    assert RunDirectory(run).latest() == RunDirectory(run).path(2)
