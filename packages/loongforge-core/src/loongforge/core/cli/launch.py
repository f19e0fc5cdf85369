"""Start the workers of a run and answer for how they end.

Torch's elastic launcher starts and watches the processes. What is added here is small: a signal to this process reaches
the workers as SIGTERM and they are waited for as long as saving takes; a worker that ends with an error writes it down,
so that the first one is shown once and its exit code becomes this process's own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType

from loongforge.core import env
from loongforge.core.config.run import LaunchConfig, RunConfig
from loongforge.core.errors import PREEMPTED_EXIT_CODE, ConfigError, ForgeError
from loongforge.core.port import held_port

Entry = Callable[[RunConfig], None]
"""What every worker runs: importable by name, so that it reaches a spawned process too."""

POLL_SECONDS = 0.1
"""How often the workers are looked at."""


class WorkerError(ForgeError):
    """A worker ended with an error; `exit_code` is the worker's."""

    def __init__(self, text: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How one worker ended, in its own words."""

    rank: int
    code: int
    text: str
    crash: bool
    """True when the text is the traceback of an unexpected error."""
    time_ns: int
    """When, on this node's clock."""


def launch(config: RunConfig, entry: Entry, *, nproc: int, preload: Callable[[], None] | None) -> int:
    """Run `entry(config)` in every worker and return the exit code of the run: 0, or 75 after a preemption.

    In this process when a launcher has set its variables or when there is one worker; otherwise, and in the container
    of a PyTorchJob that has several, in `nproc` new processes on this node: forked after one call of `preload` here, or
    spawned when it is None.
    Raises the `ForgeError` of this process, or `WorkerError` with the first error of the workers.
    """
    if nproc > 1 and (container := env.container()):
        return _run_workers(_in_container(config, container), entry, nproc, preload)
    if worker := env.worker():
        env.export(worker, *env.rendezvous())
        return _run_here(entry, config)
    if nproc * config.launch.nnodes == 1:
        alone = env.Worker(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="single")
        with held_port() as port:
            env.export(alone, "127.0.0.1", port)
            return _run_here(entry, config)
    return _run_workers(config, entry, nproc, preload)


def world_size(launch: LaunchConfig, nproc: int) -> int:
    """Workers of the whole job when `nproc` run on this node."""
    if nproc > 1 and (container := env.container()):
        return nproc * container.count
    worker = env.worker()
    return worker.world_size if worker else nproc * launch.nnodes


def _in_container(config: RunConfig, container: env.Container) -> RunConfig:
    host, port = env.rendezvous()
    launch = replace(config.launch, nnodes=container.count, node_rank=container.rank, rdzv_endpoint=f"{host}:{port}")
    return replace(config, launch=launch)


def _run_here(entry: Entry, config: RunConfig) -> int:
    try:
        entry(config)
    except SystemExit as stop:
        if stop.code not in (None, 0, PREEMPTED_EXIT_CODE):
            raise
        return PREEMPTED_EXIT_CODE if stop.code else 0
    return 0


def _run_workers(config: RunConfig, entry: Entry, nproc: int, preload: Callable[[], None] | None) -> int:
    with _endpoint(config.launch) as endpoint, _forward_signals() as signals:
        if preload:
            preload()
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
        from torch.distributed.launcher.api import elastic_launch

        with tempfile.TemporaryDirectory(prefix="loongforge-") as scratch, _quiet(config.launch.max_restarts == 0):
            elastic = ElasticConfig(
                min_nodes=config.launch.nnodes,
                max_nodes=config.launch.nnodes,
                nproc_per_node=nproc,
                run_id="loongforge",
                # static: node_rank decides the order, and no thread runs here that a fork would have to survive
                rdzv_backend="static",
                rdzv_endpoint=endpoint,
                rdzv_configs={
                    "rank": config.launch.node_rank,
                    "timeout": int(60 * config.launch.distributed_timeout_minutes),
                },
                max_restarts=config.launch.max_restarts,
                monitor_interval=POLL_SECONDS,
                start_method="fork" if preload else "spawn",
                signals_to_handle="SIGQUIT",  # torch's way with a signal is to kill after 30 s; ours waits for the save
                logs_specs=DefaultLogsSpecs(log_dir=scratch),
            )
            share = max(1, len(os.sched_getaffinity(0)) // nproc)
            try:
                codes = elastic_launch(elastic, _work)(entry, config, scratch, share)
            except ChildFailedError as failed:
                rank, failure = failed.get_first_failure()
                if signals.killed:
                    raise WorkerError("killed by the second Ctrl-C before the state was saved.", 130) from None
                if signals.received and failure.exitcode == -signal.SIGTERM:
                    print("stopped before or after training: run the same command again.", file=sys.stderr)
                    return PREEMPTED_EXIT_CODE
                raise _verdict(Path(scratch), rank, failure.exitcode) from None
    return max(codes.values())


def _work(entry: Entry, config: RunConfig, scratch: str, share: int) -> int:
    """Body of one worker. Returns 0 or 75; any other ending is written down and leaves through SystemExit."""
    launcher = os.getppid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        # The launching process turns a Ctrl-C into SIGTERM; SIGINT alone means that process is gone.
        if os.getppid() != launcher:
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, interrupt)
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), share))
    worker = env.worker()
    assert worker is not None, "the elastic agent sets RANK and WORLD_SIZE"
    note = Path(scratch) / f"{worker.rank}.json"
    note.unlink(missing_ok=True)  # of the attempt before a restart
    code, text, crash = _outcome(entry, config)
    if code in (0, PREEMPTED_EXIT_CODE):
        return code
    if config.launch.max_restarts:
        print(f"rank {worker.rank}: {text}", file=sys.stderr, flush=True)
    ending = Ending(rank=worker.rank, code=code, text=text, crash=crash, time_ns=time.time_ns())
    part = note.with_suffix(".part")
    part.write_text(json.dumps(asdict(ending)))
    part.replace(note)
    if crash:
        time.sleep(3 * POLL_SECONDS)  # a peer that was killed is the cause: let it be seen before this one ends
    raise SystemExit(code)


def _outcome(entry: Entry, config: RunConfig) -> tuple[int, str, bool]:
    """Exit code, message and whether the message is the traceback of an unexpected error."""
    try:
        entry(config)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return code, f"exit: {stop.code}", False
    except ForgeError as error:
        return error.exit_code, str(error), False
    except Exception:  # noqa: BLE001 - shown, with its rank, by the launching process
        return 1, traceback.format_exc(), True
    return 0, "", False


def _verdict(scratch: Path, rank: int, exitcode: int) -> WorkerError:
    """The first error written down; the others follow from it (a lost peer, a broken connection)."""
    if exitcode < 0 and exitcode != -signal.SIGTERM:
        name = signal.Signals(-exitcode).name
        hint = " It may have run out of memory: see the kernel log." if exitcode == -signal.SIGKILL else ""
        return WorkerError(f"rank {rank} was killed by {name}.{hint}", 128 - exitcode)
    endings = [Ending(**json.loads(path.read_text())) for path in scratch.glob("*.json")]
    if endings:
        first = min(endings, key=lambda ending: ending.time_ns)
        text = f"rank {first.rank} crashed:\n{first.text}" if first.crash else first.text
        return WorkerError(text, first.code)
    return WorkerError(f"rank {rank} ended with exit code {exitcode} and left no message.", abs(exitcode) or 1)


@dataclass(slots=True)
class _Signals:
    """What has arrived so far, and which workers were told."""

    received: bool = False
    killed: bool = False
    told: set[int | None] = field(default_factory=set[int | None])

    def handle(self, number: int, frame: FrameType | None) -> None:
        """First signal: ask the workers to save. Another Ctrl-C: kill them."""
        workers = multiprocessing.active_children()
        if not workers:
            raise SystemExit(PREEMPTED_EXIT_CODE)
        if self.received and number == signal.SIGINT:
            self.killed = True
            for worker in workers:
                worker.kill()
        if not self.received:
            self.received = True
            # A worker that is just being started is not listed yet: look again until this process ends.
            signal.setitimer(signal.ITIMER_REAL, POLL_SECONDS, POLL_SECONDS)

    def tell(self, number: int, frame: FrameType | None) -> None:
        """Send SIGTERM to every worker that has not had one."""
        for worker in multiprocessing.active_children():
            if worker.pid not in self.told:
                self.told.add(worker.pid)
                worker.terminate()


@contextlib.contextmanager
def _forward_signals() -> Iterator[_Signals]:
    """SIGTERM and SIGINT go to the workers while this is open; the handlers found here come back after it."""
    signals = _Signals()
    ours = {signal.SIGTERM: signals.handle, signal.SIGINT: signals.handle, signal.SIGALRM: signals.tell}
    found = {number: signal.getsignal(number) for number in (*ours, signal.SIGQUIT)}
    try:
        for number, handler in ours.items():
            signal.signal(number, handler)
        yield signals
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in found.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """Keep torch's own account of a failed worker to itself; with restarts it tells the story, so it stays."""
    noisy = ("torch.distributed.elastic", "torch.multiprocessing")
    names = [name for name in logging.root.manager.loggerDict if name.startswith(noisy)]
    loggers = [logging.getLogger(name) for name in names] if wanted else []
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _endpoint(launch: LaunchConfig) -> Iterator[str]:
    """host:port of node 0, held where this node chooses it; `ConfigError` when several nodes have none."""
    if launch.nnodes == 1:
        with held_port() as port:
            yield f"127.0.0.1:{port}"
        return
    host, _, port = (launch.rdzv_endpoint or "").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"launch.rdzv_endpoint={launch.rdzv_endpoint!r} must be host:port of node 0 when nnodes={launch.nnodes}: "
            "give every node the same one, for example --rdzv-endpoint node0:29500."
        )
    yield f"{host}:{port}"
