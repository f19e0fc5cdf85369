"""The part of a vocabulary that one rank of a tensor parallel group has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The rows of the vocabulary that a rank has."""

    group: dist.ProcessGroup
    first: int
    count: int
    widest: int
    """Most rows that a rank has: all must work on blocks of the same tokens."""

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup, sizes: Sequence[int] | None) -> Shard:
        """Those of `weight`; without the sizes of all ranks they tell each other, which waits for the device."""
        sizes = shards(weight, group) if sizes is None else sizes
        rank = group.rank()
        assert len(sizes) == group.size(), f"tp_rows names {len(sizes)} ranks, the group has {group.size()}"
        assert sizes[rank] == len(weight), f"tp_rows gives rank {rank} {sizes[rank]} rows, its weight has {len(weight)}"
        return cls(group=group, first=sum(sizes[:rank]), count=sizes[rank], widest=max(sizes))

    def mine(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which labels are rows of this rank, and their places among them, any place for the others."""
        place = index - self.first
        mine = (place >= 0) & (place < self.count)
        return mine, place.where(mine, 0)

    def everywhere(self, here: Tensor) -> Tensor:
        """Whether a bool `[]` holds on all ranks, again `[]`."""
        flag = here.to(torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group)
        return flag.bool()


def shards(weight: Tensor, group: dist.ProcessGroup) -> list[int]:
    """How many rows of weight each rank of a group has."""
    sizes = torch.empty(group.size(), dtype=torch.int64, device=weight.device)
    dist.all_gather_into_tensor(sizes, sizes.new_tensor([len(weight)]), group=group)
    return sizes.tolist()
