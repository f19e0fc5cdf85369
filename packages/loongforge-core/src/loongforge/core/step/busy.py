"""How long each replica is busy in a step before it waits for the others, written down with what it computed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loongforge.core.data.balance import meeting
from loongforge.core.data.work import identity, work_of
from loongforge.core.errors import ConfigError, DataError
from loongforge.core.megatron.groups import World
from loongforge.core.plan import Plan
from loongforge.core.step.optimizer import Training

Measure = Callable[[int, Sequence[Mapping[str, Any]]], AbstractContextManager[None]]
"""Around the training of step number n with these micro-batches."""


def busy_times(plan: Plan, world: World, training: Training) -> Measure:
    """Write a row for each replica and step to `data.balance_times`, the first step left out; nothing when it is unset.

    Busy is a replica's slowest rank, from the start of the step until gradients are summed over replicas: on a CPU the
    processor time of its process, elsewhere the time on the clock. The file begins with what it was measured on. Every
    rank calls it; `DataError` on all of them when the file has times of another model or layout, `ConfigError` where
    replicas meet before the step ends.
    """
    name = plan.config.data.balance_times
    if name is None:
        return lambda step, micro_batches: nullcontext()
    if meeting(plan) != "step" or (plan.encoder is not None and plan.encoder.mode == "apart"):
        raise ConfigError(
            "data.balance_times: in this layout ranks of several replicas wait for each other inside a step, so their "
            "times are not those of their own work. Leave it out, or give neither experts nor the encoder ranks of "
            "other replicas."
        )
    problems: list[str] = []
    if world.is_main:
        problems = _begin(Path(name), identity(plan))
    if problems := world.agree(problems):
        raise DataError(*problems)
    return _Recorder(plan, world, training, Path(name))


def _begin(path: Path, about: dict[str, Any]) -> list[str]:
    """Write the first line, or find it there already."""
    header = json.dumps({"about": about})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            file.seek(0)
            there = file.readline().rstrip("\n")
            if not there:
                file.write(header + "\n")
    except OSError as error:
        return [f"data.balance_times: cannot write {path}: {error.strerror or error}."]
    if there and there != header:
        return [
            f"data.balance_times: {path} does not begin as a file of times of this model and layout does: name another."
        ]
    return []


class _Recorder:
    def __init__(self, plan: Plan, world: World, training: Training, path: Path) -> None:
        self._plan, self._world, self._path = plan, world, path
        self._on_cpu = world.device.type == "cpu"
        self._began = self._busy = 0.0
        self._warm = False
        finish = training.config.finalize_model_grads_func

        def stop_and_finish(*args: Any, **options: Any) -> Any:
            self._busy = self._now() - self._began
            return finish(*args, **options)

        training.config.finalize_model_grads_func = stop_and_finish

    @contextmanager
    def __call__(self, step: int, micro_batches: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        self._began = self._now()
        yield
        if self._warm:  # the first step pays for everything that happens once
            self._write(step, micro_batches)
        self._warm = True

    def _now(self) -> float:
        if self._on_cpu:
            return time.process_time()
        self._world.platform.synchronize()
        return time.perf_counter()

    def _write(self, step: int, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        replica = self._world.dp.rank()
        told = {"step": step + 1, "replica": replica, **asdict(work_of(self._plan, micro_batches))}
        every = self._world.gather({**told, "seconds": self._busy})
        if not self._world.is_main:
            return
        slowest: dict[int, dict[str, Any]] = {}
        for row in every:
            known = slowest.get(row["replica"])
            if known is None or row["seconds"] > known["seconds"]:
                slowest[row["replica"]] = row
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(slowest[one]) + "\n" for one in sorted(slowest))
        except OSError as error:
            raise DataError(
                f"data.balance_times: cannot write {self._path}: {error.strerror or error}. Make room, or leave it out."
            ) from error
