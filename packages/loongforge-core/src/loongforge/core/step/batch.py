"""From the loader's micro-batch to what this rank feeds the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from loongforge.core.megatron.context_parallel import local_indices
from loongforge.core.megatron.groups import World
from loongforge.core.megatron.layers import PackedRow
from loongforge.core.model.contract import Ahead
from loongforge.core.platform.sending import sent


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro-batch on the device, this context parallel rank's part."""

    tokens: torch.Tensor
    """int64 `[B, S]`."""
    labels: torch.Tensor
    """int64 `[B, S]`."""
    loss_mask: torch.Tensor
    """fp32 `[B, S]`."""
    position_ids: torch.Tensor
    """int64 `[B, S]`, or `[3, B, S]` for time, height and width."""
    packed: PackedRow | None
    ahead: Ahead | None
    """For further layers of multi-token prediction; None without."""


def to_device(batch: Mapping[str, torch.Tensor], world: World, depths: int = 0) -> MicroBatch:
    """Take this rank's tokens of every sequence and move them; `cu_seqlens` marks a packed row.

    `depths` are the further layers of multi-token prediction.
    """
    ends = batch.get("cu_seqlens")
    boundaries = boundaries_of(batch)
    packed = None if ends is None else PackedRow.of(boundaries, world.device)
    fields = {name: batch[name] for name in ("tokens", "labels", "loss_mask", "position_ids")}
    further = {name: torch.stack(further_on(batch, name, depths)) for name in AHEAD} if depths else {}
    index = local_indices(boundaries, world.cp.rank(), world.cp.size()) if world.cp.size() > 1 else None

    def mine(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        cut = tensors if index is None else {name: tensor[..., index] for name, tensor in tensors.items()}
        return {name: sent(tensor, world.device) for name, tensor in cut.items()}

    return MicroBatch(**mine(fields), packed=packed, ahead=Ahead(**mine(further)) if depths else None)


def of_all_replicas(counts: torch.Tensor, world: World) -> list[float]:
    """Sums of what data parallel ranks counted on the host, fp64 `[N]`; one of them alone asks no device."""
    if world.dp.size() > 1:
        counts = sent(counts, world.device)
        dist.all_reduce(counts, group=world.dp)
    return counts.tolist()


AHEAD = ("tokens", "labels", "loss_mask")
"""Fields of a batch that a further layer has its own of."""


def boundaries_of(batch: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Where the documents of a packed row end, from 0 on; the whole row is one otherwise."""
    ends = batch.get("cu_seqlens")
    return (0, batch["tokens"].size(1)) if ends is None else tuple(ends.tolist())


def further_on(batch: Mapping[str, torch.Tensor], name: str, depths: int) -> list[torch.Tensor]:
    """The field `[B, S]` as each depth has it, whole rows: `k` places on within a document, 0 beyond its end."""
    found: list[torch.Tensor] = []
    for depth in range(1, depths + 1):
        shifted = torch.zeros_like(batch[name])
        for start, end in pairwise(boundaries_of(batch)):
            shifted[..., start : max(start, end - depth)] = batch[name][..., start + depth : end]
        found.append(shifted)
    return found
