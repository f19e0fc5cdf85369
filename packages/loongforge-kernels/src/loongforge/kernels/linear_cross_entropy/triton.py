"""Linear layer and cross entropy over blocks of tokens, with one Triton kernel between the products of a block.

The kernel finds the losses and writes the gradient of the logits over them, in their dtype: a block is one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from loongforge.kernels.cross_entropy.triton import gradient, losses
from loongforge.kernels.linear_cross_entropy.blocks import ACCELERATOR_BLOCK_BYTES, Rows, Way, run
from loongforge.kernels.linear_cross_entropy.eager import add
from loongforge.kernels.linear_cross_entropy.shard import Shard

TILE = 128
"""Tokens of the tiles that matrix products work in."""


def _rows(shard: Shard | None) -> Rows:
    def whole(logits: Tensor, index: Tensor, factor: Tensor | None) -> Tensor:
        return losses(logits, index, factor)[0]

    def shared(logits: Tensor, index: Tensor, factor: Tensor | None) -> Tensor:
        assert shard is not None
        place = index - shard.first
        loss, found = _of_all(shard, losses(logits, place)[1] if shard.count else None, place)
        if factor is not None and shard.count:
            gradient(logits, place, factor, found, logits)
        return loss

    return whole if shard is None else shared


def _of_all(shard: Shard, found: Tensor | None, place: Tensor) -> tuple[Tensor, Tensor]:
    """Loss `[R, 1]`, and the findings `[3, R]` of the whole vocabulary from those of this rank's rows, None of none."""
    place = place.squeeze(1)
    mine = (place >= 0) & (place < shard.count)
    if found is None:
        found = torch.zeros(3, len(place), dtype=torch.float32, device=place.device)
        found[0] = float("-inf")
    own, rest, distance = found
    top = own.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
    below = own - top
    sums = torch.stack((rest * below.exp(), torch.where(mine, distance + below, 0), mine.to(rest.dtype)))
    dist.all_reduce(sums, group=shard.group)
    rest, distance, holders = sums
    loss = torch.where(distance == 0, rest.log1p(), (rest + distance.exp()).log() - distance)
    return loss.masked_fill_(holders != 1, float("nan")).unsqueeze(1), torch.stack((top, rest, distance))


def _add(total: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    # 16-bit factors are multiplied into an fp32 total: torch takes such a total on GPUs alone, since 2.10 or 2.11
    if total.dtype != left.dtype and total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:
        add(total, left, right, beta)


WAY = Way(rows=_rows, add=_add, block_bytes=ACCELERATOR_BLOCK_BYTES, wide=False, tile=TILE)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor | None = None, ignore_index: int = -100,
    block_bytes: int | None = None, tp_group: dist.ProcessGroup | None = None, tp_rows: Sequence[int] | None = None,
    sum_hidden: bool = True, proportional: bool = False,
) -> Tensor:  # fmt: skip
    """loss `[...]`; see the package. `block_bytes` bounds the memory for a block of logits in their dtype.

    A label that is no row of the vocabulary gets the loss NaN, with one rank too.
    """
    return run(
        WAY, hidden, weight, labels, token_weight, ignore_index, block_bytes, tp_group, tp_rows, sum_hidden,
        proportional,
    )  # fmt: skip
