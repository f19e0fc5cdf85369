"""Encoder, projector and foundation together: who feeds whom, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from loongforge.core.exchange.move import Carrier, gather, move
from loongforge.core.exchange.route import Grid, Item, Route, Scene, patch_slices, route
from loongforge.core.megatron.grids import EncoderRanks, Seat
from loongforge.core.model.contract import Visual
from loongforge.core.model.geometry import EncoderGeometry
from loongforge.core.platform.sending import sent


class Tower(torch.nn.Module):
    """An encoder and its projector: from patches to rows of the foundation's width."""

    def __init__(
        self, image_encoder: torch.nn.Module, image_projector: torch.nn.Module, geometry: EncoderGeometry
    ) -> None:
        super().__init__()
        self.image_encoder, self.image_projector = image_encoder, image_projector
        self.geometry = geometry
        config: Any = image_encoder.config
        self.config = config

    def forward(self, pixels: torch.Tensor, grid: Sequence[Grid]) -> torch.Tensor:
        """Patches `[P, patch_dim]` of all items to `[features, 1 + levels, H]`."""
        hidden = self.image_encoder(pixels.to(self.config.params_dtype), grid)
        return self.image_projector(hidden, grid)

    def nothing(self, device: torch.device) -> tuple[torch.Tensor, list[Grid]]:
        """Patches and grid of the smallest image there is, for a block without one: its gradients are zero, not absent.

        Absent gradients would leave a bucket waiting for ever.
        """
        side = self.geometry.spatial_merge_size
        return torch.zeros(side * side, self.geometry.patch_dim, device=device), [(1, side, side)]


@dataclass(frozen=True, kw_only=True)
class Features:
    """What one rank holds of the features of some micro-batches."""

    rows: torch.Tensor
    """`[received, 1 + levels, H]`: by micro-batch, then by position; a share where tensor parallel ranks gather."""
    bounds: tuple[int, ...]
    """Ends of each micro-batch's rows, from 0 on."""
    positions: tuple[torch.Tensor, ...]
    """int64: places in the hidden states, of all rows after gathering, for each micro-batch."""
    owed: tuple[int, ...]
    """Rows of each micro-batch that this rank's place in the first stage takes, wherever they wait."""
    tp: dist.ProcessGroup
    """The foundation's."""

    def of(self, number: int) -> torch.Tensor:
        """Rows of one micro-batch as they were received."""
        return self.rows[self.bounds[number] : self.bounds[number + 1]]

    def without_rows(self) -> Features:
        """Where rows go, for someone who keeps them elsewhere."""
        return replace(self, rows=self.rows.detach()[:0].clone())

    def visual(self, number: int, rows: torch.Tensor, *, shared: bool) -> Visual:
        """What the foundation takes, from the micro-batch's rows."""
        places = self.positions[number]
        return Visual(rows=gather(rows, len(places), self.tp) if shared else rows, positions=places)


class OmniCombinationModel:
    """The tower of this rank, and the ranks it works with."""

    def __init__(self, tower: Any, ranks: EncoderRanks, tp: dist.ProcessGroup, *, split: bool) -> None:
        self.tower, self.ranks, self.tp, self.split = tower, ranks, tp, split
        plain: Any = tower
        while not isinstance(plain, Tower):
            plain = plain.module
        self.plain: Tower = plain

    def encode(
        self, scenes: Sequence[Scene], pixels: Sequence[torch.Tensor | None], stages: int = 1
    ) -> tuple[Features, bool]:
        """Features of this replica's micro-batches, encoded by its domain; and whether tensor ranks share them.

        Those of micro-batch m go to stage `m % stages`.

        `pixels[m]` are the patches of micro-batch m on the host, `[P, patch_dim]`, None without items; only what this
        rank encodes goes to the device. Collective over the domain.
        """
        everyone, patches = self._gathered(scenes, pixels)
        ways = route(everyone, self.ranks.domain, self.plain.geometry, split=self.split, stages=stages)
        features = self._made(ways, everyone, patches)
        carrier = Carrier.of(ways, self.ranks.group, self.ranks.groups.tp, features.device)
        rows = move(features, carrier)
        bounds = np.searchsorted(carrier.scenes, np.arange(len(scenes) + 1))
        positions, owed = self._places(ways, len(scenes), stages, rows.device)
        found = Features(rows=rows, bounds=tuple(bounds.tolist()), positions=positions, owed=owed, tp=self.tp)
        return found, ways.shared

    def _gathered(
        self, scenes: Sequence[Scene], pixels: Sequence[torch.Tensor | None]
    ) -> tuple[list[Sequence[Scene]], list[Sequence[torch.Tensor | None]]]:
        """Scenes and patches of every replica of the domain, replica by replica."""
        domain = self.ranks.domain
        if len(domain.replicas) == 1:
            return [scenes], [pixels]
        told: list[Any] = [None] * len(domain.ranks)
        seat = self._seat()
        first = seat == Seat(tp=0, cp=0, dp=seat.dp, pp=0)
        dist.all_gather_object(told, (scenes, pixels) if first else None, group=self.ranks.control)
        spoken = {place.dp: one for place, one in zip(domain.seats, told, strict=True) if one is not None}
        return [spoken[replica][0] for replica in domain.replicas], [spoken[replica][1] for replica in domain.replicas]

    def _made(
        self, ways: Route, scenes: list[Sequence[Scene]], patches: list[Sequence[torch.Tensor | None]]
    ) -> torch.Tensor:
        """This block's features, `[block rows, 1 + levels, H]`."""
        block = self.ranks.group.rank() // self.ranks.domain.tp
        device = next(self.plain.parameters()).device
        mine = ways.items_of(block)
        if not mine:
            return self.tower(*self.plain.nothing(device))[:0]

        def patch(item: Item) -> torch.Tensor:
            whole = patches[item.replica][item.scene]
            assert whole is not None, "a micro-batch with items has patches"
            return whole[patch_slices(scenes[item.replica][item.scene].grids)[item.number]]

        grids = [scenes[item.replica][item.scene].grids[item.number] for item in mine]
        return self.tower(sent(torch.cat([patch(item) for item in mine]), device), grids)

    def _places(
        self, ways: Route, count: int, stages: int, device: torch.device
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        """For this rank's tensor and context parallel part of each micro-batch: hidden places of all features,
        ascending, and how many of them this rank itself takes."""
        seat, seats = self._seat(), self.ranks.domain.seats
        places: list[torch.Tensor] = []
        owed: list[int] = []
        for number in range(count):
            there = replace(seat, pp=number % stages)
            own = seats.index(there)
            peers = [rank for rank, one in enumerate(seats) if replace(one, tp=seat.tp) == there]
            here = ways.scene == number
            mine = here & np.isin(ways.target, peers if ways.shared else [own])
            places.append(sent(torch.from_numpy(np.sort(ways.hidden[mine])), device))
            owed.append(int((here & (ways.target == own)).sum()))
        return tuple(places), tuple(owed)

    def _seat(self) -> Seat:
        return self.ranks.domain.seats[self.ranks.group.rank()]
