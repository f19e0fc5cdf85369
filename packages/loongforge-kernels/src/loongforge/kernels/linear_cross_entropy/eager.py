"""Linear layer and cross entropy over blocks of tokens.

Each block's logits live in one scratch buffer: loss, probabilities, then the two matrix products of the backward while
they are still there. Memory is the block and the gradient of the weight, whatever the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from loongforge.kernels.cross_entropy.rows import losses, to_gradient
from loongforge.kernels.linear_cross_entropy.reference import shards

BLOCK_BYTES = 64 << 20
"""Size of a block of fp32 logits. Below 16 MiB the products get too thin and the weight gradient is summed too often;
above 64 MiB there is nothing left to gain: measured at V 8192 and 32000."""

MIN_ROWS = 16
"""Fewest tokens in a block, however large the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """The rows of the vocabulary that a rank has."""

    group: dist.ProcessGroup
    first: int
    count: int
    widest: int
    """Most rows that a rank has: all must work on blocks of the same tokens."""

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup) -> _Shard:
        """Those of `weight`; the ranks of the group tell each other how many they have."""
        sizes = shards(weight, group)
        first = sum(sizes[: group.rank()])
        return cls(group=group, first=first, count=len(weight), widest=max(sizes))

    def losses(self, logits: Tensor, index: Tensor, probabilities: Tensor) -> Tensor:
        """Loss `[R, 1]` of wide logits `[R, V / tp]` at labels `[R, 1]`; fills `probabilities` `[R, V / tp]`."""
        mine, place = self._mine(index)
        top = logits.amax(-1, keepdim=True) if self.count else logits.new_full((len(logits), 1), float("-inf"))
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        distance = torch.sub(logits, top, out=probabilities)
        picked = distance.gather(1, place).masked_fill(~mine, 0.0) if self.count else torch.zeros_like(top)
        total = probabilities.exp_().sum(-1, keepdim=True)
        sums = torch.cat((total, picked, mine.to(total.dtype)), 1)  # [R, 3]
        dist.all_reduce(sums, group=self.group)
        total, picked, holders = sums.split(1, 1)
        probabilities.div_(total)
        return (total.log() - picked).masked_fill_(holders != 1, float("nan"))

    def to_gradient(self, probabilities: Tensor, index: Tensor, loss: Tensor, factor: Tensor) -> Tensor:
        """As of a whole vocabulary, where the label is one of these rows; elsewhere all are probabilities."""
        mine, place = self._mine(index)
        if self.count:
            probabilities.scatter_(1, place, torch.expm1(-loss).where(mine, probabilities.gather(1, place)))
        return probabilities.mul_(factor)

    def agree(self, here: bool, like: Tensor) -> bool:
        """Whether it is so on every rank."""
        flag = torch.tensor([int(here)], device=like.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group)
        return bool(flag.item())

    def _mine(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which labels are rows of this rank, and their places among them, any place for the others."""
        place = index - self.first
        mine = (place >= 0) & (place < self.count)
        return mine, place.where(mine, 0)


class _Result(NamedTuple):
    loss: Tensor
    dhidden: Tensor | None
    dweight: Tensor | None


def _pass(
    hidden: Tensor, weight: Tensor, index: Tensor, factor: Tensor, need: tuple[bool, bool], block_bytes: int,
    shard: _Shard | None,
) -> _Result:  # fmt: skip
    """Losses `[T]`, and the gradients that `need` names (hidden, weight) of sum(factor * loss); factor `[T, 1]`."""
    tokens, vocab = hidden.shape[0], weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    narrow = hidden.dtype != wide
    of_rows, into_gradient = (losses, to_gradient) if shard is None else (shard.losses, shard.to_gradient)
    widest = vocab if shard is None else shard.widest
    blocks = max(1, -(-tokens // max(MIN_ROWS, block_bytes // (4 * widest))))
    size = max(1, -(-tokens // blocks))
    loss = torch.empty(tokens, 1, dtype=wide, device=hidden.device)
    dhidden = torch.empty_like(hidden) if need[0] else None
    # sums over several blocks are kept wide
    dweight = torch.empty_like(weight, dtype=wide if blocks > 1 else weight.dtype) if need[1] else None
    logits = torch.empty(size, vocab, dtype=hidden.dtype, device=hidden.device)
    scratch = torch.empty(size, vocab, dtype=wide, device=hidden.device)
    for at in range(0, tokens, size):
        part = slice(at, at + size)
        some = hidden[part]
        raw, probabilities = logits[: len(some)], scratch[: len(some)]
        torch.mm(some, weight.t(), out=raw)
        loss[part] = of_rows(probabilities.copy_(raw) if narrow else raw, index[part], probabilities)
        if not any(need):
            continue
        gradient = into_gradient(probabilities, index[part], loss[part], factor[part])
        dlogits = raw.copy_(gradient) if narrow else gradient
        if dhidden is not None:
            torch.mm(dlogits, weight, out=dhidden[part])
        if dweight is not None and dweight.dtype == hidden.dtype:
            dweight.addmm_(dlogits.t(), some, beta=0 if at == 0 else 1)  # beta 0 ignores what was there
        elif dweight is not None and at == 0:
            dweight.copy_(dlogits.t() @ some)
        elif dweight is not None:
            dweight.add_(dlogits.t() @ some)
    if shard is not None and dhidden is not None:
        dist.all_reduce(dhidden, group=shard.group)
    return _Result(loss.squeeze(1), dhidden, dweight)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, index: Tensor, kept: Tensor, token_weight: Tensor, grad: bool,
        block_bytes: int, shard: _Shard | None,
    ) -> Tensor:  # fmt: skip
        need = (grad and ctx.needs_input_grad[0], grad and ctx.needs_input_grad[1])
        factor = (token_weight * kept).unsqueeze(1)
        result = _pass(hidden, weight, index, factor, need, block_bytes, shard)
        ctx.need, ctx.block_bytes, ctx.shard = need, block_bytes, shard
        ctx.save_for_backward(hidden, weight, index, kept, factor)
        ctx.gradients = (result.dhidden, result.dweight)
        return result.loss.where(kept, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, index, kept, factor = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so good for one backward
        grad = (grad * kept).unsqueeze(1)
        scale = None if gradients is None else _ratio(grad, factor)
        if ctx.shard is not None and not ctx.shard.agree(scale is not None, hidden):
            scale = None  # what has to be computed again is computed on all ranks, which wait for each other
        if gradients is None or scale is None:
            _, dhidden, dweight = _pass(hidden, weight, index, grad, ctx.need, ctx.block_bytes, ctx.shard)
        else:
            dhidden, dweight = (None if one is None else one.mul_(scale) for one in gradients)
        return dhidden, None if dweight is None else dweight.to(weight.dtype), *[None] * 6


def _ratio(grad: Tensor, factor: Tensor) -> float | None:
    """The number s with grad = s * factor up to rounding, None when there is none."""
    if not len(factor):
        return 1.0
    at = factor.abs().argmax()
    largest = factor[at].item()
    scale = grad[at].item() / largest if largest else 0.0
    return scale if torch.allclose(grad, factor * scale, rtol=1e-6, atol=0.0) else None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    block_bytes: int = BLOCK_BYTES,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """loss `[...]`; see the package. `block_bytes` bounds the scratch memory for fp32 logits."""
    flat = labels.reshape(-1)
    kept = flat != ignore_index
    index = flat.where(kept, 0).unsqueeze(1)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if token_weight is None:
        counted = torch.ones(flat.shape, dtype=wide, device=flat.device)
    else:
        counted = token_weight.detach().reshape(-1).to(wide)
    rows = hidden.reshape(-1, hidden.shape[-1])
    shard = None if tp_group is None else _Shard.of(weight, tp_group)
    loss = _LinearCrossEntropy.apply(rows, weight, index, kept, counted, torch.is_grad_enabled(), block_bytes, shard)
    return loss.view(labels.shape)
