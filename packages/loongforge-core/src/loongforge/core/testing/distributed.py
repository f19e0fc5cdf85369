"""Run a function in several processes on this machine, as the workers of one job."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import unittest
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from loongforge.core import env
from loongforge.core.platform.choose import choose
from loongforge.core.port import held_port


def run_distributed[T](function: Callable[[env.Worker], T], world: int, *, timeout: float = 180.0) -> list[T]:
    """`function(worker)` in `world` forked processes; their picklable results by rank.

    Import what is heavy before calling: the processes inherit it. Raises `AssertionError` with the error and traceback
    of the first process that fails, and when `timeout` seconds pass, with the lines at which the late ones stand; no
    process survives the call. Raises `unittest.SkipTest`, which pytest knows, where the platform has fewer devices.
    """
    _require_devices(world)
    context = multiprocessing.get_context("fork")
    pipes: dict[Connection, int] = {}
    processes: list[Any] = []
    stands = [tempfile.TemporaryFile() for _ in range(world)]  # noqa: SIM115  closed with the processes
    # A process group that is garbage joins its threads when it is collected, and a forked process has none of them: it
    # would wait for ever. What is garbage goes before, and the rest is kept from the collector of the processes.
    gc.collect()
    gc.freeze()
    with held_port() as port:
        for rank in range(world):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(function, rank, world, port, send, stands[rank]))
            with warnings.catch_warnings():
                # The processes set torch to one thread before they compute: no pool of this process is waited for.
                warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
                process.start()
            send.close()
            pipes[receive] = rank
            processes.append(process)
        gc.unfreeze()
        try:
            return _collect(pipes, world, timeout)
        except _Late as late:
            where = [f"\nrank {rank}: {_stand(processes[rank], stands[rank])}" for rank in late.ranks]
            raise AssertionError(f"{late}{''.join(where)}") from None
        finally:
            for process, stand in zip(processes, stands, strict=True):
                if process.is_alive():
                    process.kill()
                process.join()
                stand.close()


def _require_devices(world: int) -> None:
    """Every process takes a device of its own, except on a CPU."""
    choice = choose()
    devices = 0 if choice.spec.device == "cpu" else choice.platform().device_count()
    if 0 < devices < world:
        raise unittest.SkipTest(f"needs {world} devices of platform {choice.name}, {devices} here")


class _Late(Exception):
    """The time is over and `ranks` have said nothing."""

    def __init__(self, ranks: list[int], world: int, timeout: float) -> None:
        super().__init__(f"ranks {ranks} of {world} did not finish in {timeout:.0f} s")
        self.ranks = ranks


def _stand(process: Any, stand: IO[bytes]) -> str:
    """The Python stack of every thread of a process, which `faulthandler` writes even from inside a C function."""
    os.kill(process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 2
    text = b""
    while time.monotonic() < deadline and process.is_alive():
        time.sleep(0.2)
        found = os.pread(stand.fileno(), 1 << 20, 0)  # its place in the file is the process's to move
        if found and found == text:
            break
        text = found
    return text.decode(errors="replace") or "it could not say where"


def _collect(pipes: dict[Connection, int], world: int, timeout: float) -> list[Any]:
    results: list[Any] = [None] * world
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while pipes:
        # Once one has failed the others wait for it in a collective: give them a moment to say why they failed too.
        left = min(deadline, time.monotonic() + 2) - time.monotonic() if failures else deadline - time.monotonic()
        ready = wait(list(pipes), timeout=max(0.0, left))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.pop(pipe)
            try:
                good, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                good, value = False, "the process ended without a word"
            if good:
                results[rank] = value
            else:
                failures[rank] = value
    if failures:
        rank = min(failures)
        raise AssertionError(f"rank {rank} of {world} failed: {failures[rank]}")
    if pipes:
        raise _Late(sorted(pipes.values()), world, timeout)
    return results


def _work(
    function: Callable[[env.Worker], Any], rank: int, world: int, port: int, pipe: Connection, stand: IO[bytes]
) -> None:
    try:
        import torch

        faulthandler.register(signal.SIGUSR1, stand)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        worker = env.Worker(rank=rank, world_size=world, local_rank=rank, local_world_size=world, launcher="torchrun")
        env.export(worker, "127.0.0.1", port)
        _send(pipe, True, function(worker))
    except BaseException as error:  # noqa: BLE001  everything, SystemExit included, is reported to the parent
        _send(pipe, False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    pipe.close()
    os._exit(0)  # without the parent's atexit handlers, which belong to the parent


def _send(pipe: Connection, good: bool, value: Any) -> None:
    """By value: torch teaches a pipe's own pickler to share a tensor's storage, which ends with this process."""
    pipe.send_bytes(pickle.dumps((good, value)))
