"""What a replica computes in a step, in numbers that its time can be explained by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loongforge.core.plan.compute import encoder_flops, flops_per_token
from loongforge.core.plan.plan import Plan

_LONG = 1 << 20
_GRID = (2, 24, 36)
"""An item that shows what items cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of all micro-batches of a replica in one step, padding included."""

    tokens: int
    squares: int
    """Sum over documents of their length squared."""
    encoder: int
    """FLOPs of all images and videos, as `encoder_flops`."""


def work_of(plan: Plan, micro_batches: Sequence[Mapping[str, Any]]) -> Work:
    """The work of micro-batches as the loader makes them."""
    lengths = torch.cat([_lengths(batch) for batch in micro_batches]).long()
    grids = [grid for batch in micro_batches for grid in batch.get("grid", torch.empty(0, 3)).tolist()]
    return Work(
        tokens=int(lengths.sum()),
        squares=int(lengths.square().sum()),
        encoder=sum(encoder_flops(plan, grid) for grid in grids),
    )


def _lengths(batch: Mapping[str, Any]) -> torch.Tensor:
    if "cu_seqlens" in batch:
        return batch["cu_seqlens"].diff()
    rows, length = batch["tokens"].shape
    return torch.full((rows,), length)


def identity(plan: Plan) -> dict[str, Any]:
    """What times are those of: the model's arithmetic, and how a replica divides it. JSON."""
    layout, encoder = plan.layout, plan.encoder
    return {
        "tp": layout.tp,
        "cp": layout.cp,
        "pp": layout.pp,
        "chunks": layout.num_chunks,
        "encoder": None if encoder is None else encoder.mode,
        "precision": plan.config.train.precision,
        "flops_per_token": flops_per_token(plan, 0),
        "flops_per_distant_token": flops_per_token(plan, _LONG) - flops_per_token(plan, 0),
        "encoder_flops": encoder_flops(plan, _GRID),
    }
