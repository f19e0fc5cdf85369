"""Ask the run to stop after the current step: a signal, or the time the user allowed."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from loongforge.core.config.run import TrainConfig
from loongforge.core.megatron.groups import World


class Stop:
    """Turns SIGTERM and SIGINT into a request that every rank sees at the same step. A context manager.

    It can be open before there are process groups, so that a signal while the model is built is not lost.
    """

    def __init__(self, config: TrainConfig) -> None:
        minutes = config.exit_duration_in_mins
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step
        self._signal = number

    def requested(self, world: World) -> bool:
        """Whether any rank was asked to stop. Collective."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        here = self._signal is not None or late
        if world.size == 1:
            return here
        flag = torch.tensor([int(here)], device=world.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
