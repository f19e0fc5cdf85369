"""Run a function in several processes of this machine that talk through gloo."""

from __future__ import annotations

import gc
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run(function: Callable[[int], None], world: int, seconds: float = 120) -> None:
    """`function(rank)` in `world` forked processes with a process group.

    Raises AssertionError with what one of them raised, or when `seconds` pass; none survives the call.
    """
    context = get_context("fork")
    failures = context.SimpleQueue()
    gc.collect()  # a process group that is garbage waits for its threads when it is collected: a fork has none of them
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # they set torch to one thread before they compute: no pool of this process is waited for
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        work = [
            context.Process(target=_join, args=(function, rank, world, str(Path(folder, "meeting")), failures))
            for rank in range(world)
        ]
        for process in work:
            process.start()
        gc.unfreeze()
        deadline = time.monotonic() + seconds
        try:
            while any(process.is_alive() for process in work) and failures.empty() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert failures.empty(), failures.get()
            for process in work:
                process.join(max(0.0, deadline - time.monotonic()))
            assert [process.exitcode for process in work] == [0] * world, f"not all {world} ended within {seconds} s"
        finally:
            for process in work:
                process.kill()
                process.join()


def _join(function: Callable[[int], None], rank: int, world: int, place: str, failures: Any) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    try:
        dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world, timeout=limit)
        function(rank)
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever it is, the test says it
        failures.put(f"rank {rank} of {world}: {traceback.format_exc()}")
        raise SystemExit(1) from None
