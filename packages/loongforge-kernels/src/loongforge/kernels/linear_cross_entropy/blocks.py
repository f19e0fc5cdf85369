"""Linear layer and cross entropy over blocks of tokens, whatever works on the rows of a block.

Each block's logits live in one buffer: loss, gradient of the logits, then the two matrix products of the backward while
it is still there. Memory is the block and the gradient of the weight, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from loongforge.kernels.linear_cross_entropy.shard import Shard

ACCELERATOR_BLOCK_BYTES = 1 << 30
"""Size of a block of logits where memory is fast. Every block reads and writes the fp32 gradient of the weight, 8 bytes
for 2 operations a token: R tokens do R / 4 operations a byte, and an H200 wants 990 TFLOP/s / 4.8 TB/s = 206. That is
reached at 824 tokens; with 3533, as many as 1 GiB holds of Qwen3's 151,936 logits in bf16, this traffic is a fourth of
the product's time."""

MIN_ROWS = 16
"""Fewest tokens in a block, however large the vocabulary."""

Rows = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Wide losses `[R, 1]` of logits `[R, V]` at labels int64 `[R, 1]`; with the wide third `[R, 1]` the logits become the
gradient of sum(third * loss)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How an implementation goes about it."""

    rows: Callable[[Shard | None], Rows]
    """Asked once for every pass over the blocks, so that blocks can share what it allocates."""
    add: Callable[[Tensor, Tensor, Tensor, int], object]
    """Add a product of two matrices to a total times 0 or 1, which may be wider than they are."""
    block_bytes: int
    """Size of a block."""
    wide: bool
    """Whether a block is counted in fp32 whatever the dtype of its logits."""
    tile: int
    """Tokens of a larger block are a multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One call of the op, besides its tensors."""

    way: Way
    shard: Shard | None
    block_bytes: int
    proportional: bool
    sum_hidden: bool


class _Result(NamedTuple):
    loss: Tensor
    dhidden: Tensor | None
    dweight: Tensor | None


def _pass(hidden: Tensor, weight: Tensor, index: Tensor, factor: Tensor, need: tuple[bool, bool], job: Job) -> _Result:
    """Losses `[T]`, and the gradients that `need` names (hidden, weight) of sum(factor * loss); factor `[T, 1]`."""
    tokens, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    size = _block_rows(tokens, weight, job)
    rows = job.way.rows(job.shard)
    loss = torch.empty(tokens, 1, dtype=wide, device=hidden.device)
    dhidden = torch.empty_like(hidden) if need[0] else None
    # sums over several blocks are kept wide
    dweight = torch.empty_like(weight, dtype=wide if size < tokens else weight.dtype) if need[1] else None
    logits = _buffer(size, weight)
    for at in range(0, tokens, size):
        part = slice(at, at + size)
        some = hidden[part]
        block = logits[: len(some)]
        torch.mm(some, weight.t(), out=block)
        loss[part] = rows(block, index[part], factor[part] if any(need) else None)
        if dhidden is not None:
            torch.mm(block, weight, out=dhidden[part])
        if dweight is not None:
            job.way.add(dweight, block.t(), some, 0 if at == 0 else 1)  # 0 ignores what was there
    if job.shard is not None and job.sum_hidden and dhidden is not None:
        dist.all_reduce(dhidden, group=job.shard.group)
    return _Result(loss.squeeze(1), dhidden, dweight.zero_() if dweight is not None and not tokens else dweight)


def _block_rows(tokens: int, weight: Tensor, job: Job) -> int:
    """Tokens of a block, of as many as all blocks have but for the last; on every rank of a vocabulary the same."""
    widest = len(weight) if job.shard is None else job.shard.widest
    most = max(MIN_ROWS, job.block_bytes // ((4 if job.way.wide else weight.element_size()) * max(1, widest)))
    blocks = max(1, -(-tokens // most))
    size = -(-tokens // blocks)
    if size > job.way.tile:
        size = -(-size // job.way.tile) * job.way.tile
    return max(1, min(tokens, size))


def _buffer(size: int, weight: Tensor) -> Tensor:
    """Room for the logits of a block, `[size, V]`; on an accelerator rows are a multiple of 128 bytes apart."""
    vocab, step = len(weight), 1 if weight.device.type == "cpu" else 128 // weight.element_size()
    return torch.empty(size, -(-vocab // step) * step, dtype=weight.dtype, device=weight.device)[:, :vocab]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, index: Tensor, kept: Tensor, token_weight: Tensor, grad: bool,
        job: Job,
    ) -> Tensor:  # fmt: skip
        need = (grad and ctx.needs_input_grad[0], grad and ctx.needs_input_grad[1])
        factor = (token_weight * kept).unsqueeze(1)
        result = _pass(hidden, weight, index, factor, need, job)
        ctx.need, ctx.job = need, job
        ctx.save_for_backward(hidden, weight, index, kept, factor)
        ctx.gradients = (result.dhidden, result.dweight)
        return result.loss.where(kept, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, index, kept, factor = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so good for one backward
        grad, job = (grad * kept).unsqueeze(1), ctx.job
        scale, right = _ratio(grad, factor)
        if job.proportional:  # no number of the device is asked for: a broken promise shows in every gradient
            scale = scale.where(right, float("nan"))
        elif gradients is not None:
            # what has to be computed again is computed on all ranks, which wait for each other
            right = right if job.shard is None else job.shard.everywhere(right)
            gradients = gradients if bool(right) else None
        if gradients is None:
            _, dhidden, dweight = _pass(hidden, weight, index, grad, ctx.need, job)
            return dhidden, None if dweight is None else dweight.to(weight.dtype), *[None] * 5
        dhidden, dweight = (
            None if one is None else _scaled(one, scale, like)
            for one, like in zip(gradients, (hidden, weight), strict=True)
        )
        return dhidden, dweight, *[None] * 5


def _scaled(gradient: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """gradient times scale `[1, 1]` in the dtype of `like`, rounded once; in place where dtypes allow."""
    return torch.mul(gradient, scale, out=gradient if gradient.dtype == like.dtype else torch.empty_like(like))


def _ratio(grad: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The number s `[1, 1]` with grad = s * factor up to rounding, and whether there is one, bool `[]`; on the device.

    Both `[T, 1]`.
    """
    if not len(factor):
        return factor.new_ones(1, 1), torch.ones((), dtype=torch.bool, device=factor.device)
    at = factor.abs().argmax().view(1)
    largest = factor.index_select(0, at)
    scale = torch.where(largest == 0, 0, grad.index_select(0, at) / largest)
    near = factor * scale
    return scale, ((grad - near).abs() <= 1e-6 * near.abs()).all()


def run(
    way: Way, hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor | None, ignore_index: int,
    block_bytes: int | None, tp_group: dist.ProcessGroup | None, tp_rows: Sequence[int] | None, sum_hidden: bool,
    proportional: bool,
) -> Tensor:  # fmt: skip
    """The op with one way of doing it; see the package."""
    flat = labels.reshape(-1)
    kept = flat != ignore_index
    index = flat.where(kept, 0).unsqueeze(1)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if token_weight is None:
        counted = torch.ones(flat.shape, dtype=wide, device=flat.device)
    else:
        counted = token_weight.detach().reshape(-1).to(wide)
    job = Job(
        way=way, shard=None if tp_group is None else Shard.of(weight, tp_group, tp_rows),
        block_bytes=block_bytes or way.block_bytes, proportional=proportional, sum_hidden=sum_hidden,
    )  # fmt: skip
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss = _LinearCrossEntropy.apply(rows, weight, index, kept, counted, torch.is_grad_enabled(), job)
    return loss.view(labels.shape)
