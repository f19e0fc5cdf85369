"""Features that wait for the pipeline, spread over the host memory of all stages.

Micro-batch m waits on stage `m % pp` and is handed to the first stage when its turn comes; its gradient goes back the
same way. Everything moves between hosts: no device waits for a stage that is busy with its own part of the schedule.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from loongforge.core.megatron.grids import EncoderRanks


class Relay:
    """One rank's part: sends what waits here, or asks for what waits elsewhere."""

    def __init__(self, ranks: EncoderRanks, stages: int) -> None:
        self.stages = stages
        self._control, seats = ranks.control, ranks.domain.seats
        self._seat = mine = seats[ranks.group.rank()]
        self._column = {seat.pp: rank for rank, seat in enumerate(seats) if replace(seat, pp=0) == replace(mine, pp=0)}
        """This rank's neighbours along the pipeline, by stage."""
        self._sent: list[tuple[Any, torch.Tensor]] = []

    def is_here(self, number: int) -> bool:
        """Whether a micro-batch waits on this rank's stage."""
        return number % self.stages == self._seat.pp

    def hand_out(self, parts: list[torch.Tensor]) -> None:
        """Begin to send what waits on this later stage to the first one; the tensors are in use until `settle`."""
        if self._seat.pp == 0:
            return
        for number, part in enumerate(parts):
            if self.is_here(number) and part.numel():
                self._send(part, 0, 2 * number)

    def fetch(self, number: int, empty: torch.Tensor) -> torch.Tensor:
        """On the first stage: the rows of a micro-batch that waits elsewhere, received into `empty`."""
        if empty.numel():
            self._receive(empty, number % self.stages, 2 * number)
        return empty

    def give_back(self, number: int, grad: torch.Tensor) -> None:
        """On the first stage: send the gradient of such a micro-batch to where its rows waited."""
        if grad.numel():
            self._send(grad, number % self.stages, 2 * number + 1)

    def take_back(self, number: int, empty: torch.Tensor) -> torch.Tensor:
        """On a later stage: that gradient, received into `empty`."""
        if empty.numel():
            self._receive(empty, 0, 2 * number + 1)
        return empty

    def settle(self) -> None:
        """Wait until everything sent has arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []

    def _send(self, tensor: torch.Tensor, stage: int, tag: int) -> None:
        work = dist.isend(tensor, group=self._control, group_dst=self._column[stage], tag=tag)
        self._sent.append((work, tensor))

    def _receive(self, tensor: torch.Tensor, stage: int, tag: int) -> None:
        dist.recv(tensor, group=self._control, group_src=self._column[stage], tag=tag)
