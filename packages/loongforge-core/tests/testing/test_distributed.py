"""The helper that starts processes says what went wrong, in time, and leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch

from loongforge.core import env
from loongforge.core.testing import run_distributed


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Workers are forked from here: no thread pool may be running."""
    torch.set_num_threads(1)


def test_results_come_by_rank() -> None:
    assert run_distributed(lambda worker: (worker.rank, worker.world_size), 3) == [(0, 3), (1, 3), (2, 3)]


def test_workers_are_told_their_place_and_can_meet() -> None:
    def meet(worker: env.Worker) -> float:
        import torch.distributed as dist

        dist.init_process_group("gloo", rank=worker.rank, world_size=worker.world_size)
        value = torch.tensor(float(worker.rank + 1))
        dist.all_reduce(value)
        dist.destroy_process_group()
        return value.item()

    assert run_distributed(meet, 2) == [3.0, 3.0]


def test_the_first_failure_is_told_with_its_reason() -> None:
    def fail(worker: env.Worker) -> None:
        if worker.rank == 1:
            raise ValueError("no such thing")
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"^rank 1 of 2 failed: ValueError: no such thing\nTraceback"):
        run_distributed(fail, 2)
    assert time.monotonic() - began < 30
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_is_told() -> None:
    import os

    with pytest.raises(AssertionError, match="rank 0 of 1 failed: the process ended without a word"):
        run_distributed(lambda worker: os._exit(9), 1)


def test_the_time_limit_holds_and_nothing_survives() -> None:
    def wait_for_nothing(worker: env.Worker) -> None:
        time.sleep(60)

    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2 did not finish in 1 s") as caught:
        run_distributed(wait_for_nothing, 2, timeout=1)
    assert str(caught.value).count("in wait_for_nothing") == 2, "each says where it stood"
    assert multiprocessing.active_children() == []
