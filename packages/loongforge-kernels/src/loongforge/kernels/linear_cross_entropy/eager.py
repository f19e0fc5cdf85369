"""Linear layer and cross entropy over blocks of tokens, in torch ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from loongforge.kernels.cross_entropy.rows import losses, to_gradient
from loongforge.kernels.linear_cross_entropy.blocks import ACCELERATOR_BLOCK_BYTES, Rows, Way, run
from loongforge.kernels.linear_cross_entropy.shard import Shard

BLOCK_BYTES = 64 << 20
"""Size of a block of fp32 logits on a CPU. Below 16 MiB the products get too thin and the weight gradient is summed too
often; above 64 MiB there is nothing left to gain: measured at V 8192 and 32000."""


def _rows(shard: Shard | None) -> Rows:
    scratch: list[Tensor] = []

    def work(logits: Tensor, index: Tensor, factor: Tensor | None) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        probabilities = logits
        if logits.dtype != wide:
            if not scratch:
                scratch.append(torch.empty(logits.shape, dtype=wide, device=logits.device))
            probabilities = scratch[0][: len(logits)].copy_(logits)
        if shard is None:
            loss = losses(probabilities, index, probabilities)
        else:
            loss = _shared_losses(shard, probabilities, index)
        if factor is None:
            return loss
        if shard is None:
            to_gradient(probabilities, index, loss, factor)
        else:
            _shared_to_gradient(shard, probabilities, index, loss, factor)
        if probabilities is not logits:
            logits.copy_(probabilities)
        return loss

    return work


def _shared_losses(shard: Shard, logits: Tensor, index: Tensor) -> Tensor:
    """Loss `[R, 1]` of wide logits `[R, V / tp]` at labels `[R, 1]`; leaves probabilities in their place."""
    mine, place = shard.mine(index)
    top = logits.amax(-1, keepdim=True) if shard.count else logits.new_full((len(logits), 1), float("-inf"))
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
    distance = logits.sub_(top)
    picked = distance.gather(1, place).masked_fill(~mine, 0.0) if shard.count else torch.zeros_like(top)
    total = logits.exp_().sum(-1, keepdim=True)
    sums = torch.cat((total, picked, mine.to(total.dtype)), 1)  # [R, 3]
    dist.all_reduce(sums, group=shard.group)
    total, picked, holders = sums.split(1, 1)
    logits.div_(total)
    return (total.log() - picked).masked_fill_(holders != 1, float("nan"))


def _shared_to_gradient(shard: Shard, probabilities: Tensor, index: Tensor, loss: Tensor, factor: Tensor) -> None:
    """As of a whole vocabulary, where the label is one of these rows; elsewhere all are probabilities."""
    mine, place = shard.mine(index)
    if shard.count:
        probabilities.scatter_(1, place, torch.expm1(-loss).where(mine, probabilities.gather(1, place)))
    probabilities.mul_(factor)


def add(total: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """total becomes beta * total + left @ right; a wider total adds up products that were rounded to its factors'."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=beta)
    elif beta:
        total.add_(left @ right)
    else:
        total.copy_(left @ right)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor | None = None, ignore_index: int = -100,
    block_bytes: int | None = None, tp_group: dist.ProcessGroup | None = None, tp_rows: Sequence[int] | None = None,
    sum_hidden: bool = True, proportional: bool = False,
) -> Tensor:  # fmt: skip
    """loss `[...]`; see the package. `block_bytes` bounds the memory for a block of fp32 logits."""
    size = BLOCK_BYTES if hidden.device.type == "cpu" else ACCELERATOR_BLOCK_BYTES
    way = Way(rows=_rows, add=add, block_bytes=size, wide=True, tile=1)
    return run(
        way, hidden, weight, labels, token_weight, ignore_index, block_bytes, tp_group, tp_rows, sum_hidden,
        proportional,
    )  # fmt: skip
