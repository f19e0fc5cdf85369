"""From the loader's micro-batch to what this rank feeds the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loongforge.core.megatron.context_parallel import local_indices
from loongforge.core.megatron.groups import World
from loongforge.core.megatron.layers import PackedRow


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


def to_device(batch: Mapping[str, torch.Tensor], world: World) -> MicroBatch:
    """Take this rank's tokens of every sequence and move them; `cu_seqlens` marks a packed row."""
    length = batch["tokens"].size(1)
    ends = batch.get("cu_seqlens")
    boundaries = (0, length) if ends is None else tuple(ends.tolist())
    packed = None if ends is None else PackedRow.of(boundaries, world.device)
    names = ("tokens", "labels", "loss_mask", "position_ids")
    if world.cp.size() > 1:
        index = local_indices(boundaries, world.cp.rank(), world.cp.size())
        fields = {name: batch[name][..., index] for name in names}
    else:
        fields = {name: batch[name] for name in names}
    moved = {name: tensor.to(world.device, non_blocking=True) for name, tensor in fields.items()}
    return MicroBatch(**moved, packed=packed)
