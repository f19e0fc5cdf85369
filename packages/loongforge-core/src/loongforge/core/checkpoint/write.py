"""Put one rank's part of a checkpoint on disk: in the foreground, or in a process behind the training.

megatron-core plans who writes what; torch's format writer turns a plan into files. Everything that the ranks must agree
about stays in `checkpoint.save`: nothing here waits for another rank.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import queue
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What this rank has to write, with the tensors on the host."""

    writer: FileSystemWriterAsync
    buckets: list[Any]
    """One per file; empty when other ranks hold everything this one has."""
    metadata: Any
    """torch's description of the whole checkpoint on rank 0, None elsewhere."""

    def write(self) -> list[Any]:
        """Write the files and flush them to the disk; torch's result of every item. Raises the first failure."""
        if not self.buckets:
            return []
        transforms = [self.writer.transforms] if hasattr(self.writer, "transforms") else []

        def one(number: int) -> Any:
            return FileSystemWriterAsync.write_preloaded_data(
                transforms,
                local_proc_idx=number,
                write_bucket=self.buckets[number],
                results_queue=None,
                count_queue=None,
                use_fsync=True,
            )

        with ThreadPoolExecutor(len(self.buckets)) as pool:
            outcomes = [outcome for _, outcome in pool.map(one, range(len(self.buckets)))]
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return list(chain.from_iterable(outcomes))

    def close(self, draft: Path, results: list[list[Any]]) -> None:
        """Rank 0, once every rank has written: say where every tensor lies, and mark the format."""
        self.writer.finish(self.metadata, results)
        save_config(CheckpointingConfig(_Strategy().backend, _Strategy().version), str(draft))


def plan_write(state: dict[str, Any], draft: Path) -> Plan:
    """Plan who writes what of a sharded state and bring this rank's part to the host. Collective."""
    strategy = _Strategy()
    # The writer asks for a queue it does not need here, and would start a process per rank that outlives a killed one.
    before, filesystem_async._results_queue = filesystem_async._results_queue, queue.Queue()
    try:
        dist_checkpointing.save(
            state, str(draft), sharded_strategy=strategy, async_sharded_save=True, async_strategy="mcore"
        )
    finally:
        filesystem_async._results_queue = before
    writer = strategy.writer
    buckets = FileSystemWriterAsync.preload_tensors(writer.write_buckets) if writer.write_buckets else []
    return Plan(writer=writer, buckets=buckets, metadata=strategy.metadata)


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's planning, kept for a writer that cannot leave the other ranks waiting.

    Why: the finalize functions it returns broadcast and wait on all ranks, after steps that can fail on one: a full
    disk on rank 0 leaves the others hanging; and its writer reports `<class 'OSError'>` in place of the reason.
    Upstream: dist_checkpointing/serialization.py save, strategies/state_dict_saver.py save_state_dict_async_finalize.
    Remove when: a failure on one rank is raised on all.
    """

    writer: FileSystemWriterAsync
    metadata: Any

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, async_strategy: str) -> Any:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, async_strategy)


class Background:
    """One plan being written by a forked process, which sees the tensors as they were when it was made.

    It ends with its parent, so that nothing writes below a run's directory after the run was killed.
    """

    def __init__(self, plan: Plan) -> None:
        self._answer = open(os.memfd_create("loongforge-checkpoint"), "w+b", buffering=0)  # noqa: SIM115 - closed in result
        self._process = multiprocessing.get_context("fork").Process(target=self._work, args=(plan,))
        with warnings.catch_warnings():
            # The child copies bytes into files: no thread of the parent holds a lock it needs.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            self._process.start()

    @property
    def running(self) -> bool:
        """Whether the process is still writing."""
        return self._process.is_alive()

    def result(self) -> list[Any]:
        """Wait, then what `Plan.write` returned; raises what it raised."""
        self._process.join()
        self._answer.seek(0)
        content = self._answer.read()
        self._answer.close()
        if not content:
            raise RuntimeError(f"the background writer ended with exit code {self._process.exitcode}")
        outcome = pickle.loads(content)  # from memory of our own child
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _work(self, plan: Plan) -> None:
        from torch.multiprocessing import _prctl_pr_set_pdeathsig  # pyright: ignore[reportAttributeAccessIssue]

        _prctl_pr_set_pdeathsig(signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGINT):  # they ask the training to stop, and it waits for this save
            signal.signal(number, signal.SIG_IGN)
        gc.disable()  # collecting what the parent holds on an accelerator would touch the device from here
        try:
            outcome: Any = plan.write()
        except Exception as error:  # noqa: BLE001 - travels to the parent, which raises it
            outcome = RuntimeError(f"{type(error).__name__}: {error}")
        self._answer.write(pickle.dumps(outcome))
