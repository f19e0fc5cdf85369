"""Linear layer and cross entropy over blocks of tokens.

Each block's logits live in one scratch buffer: loss, probabilities, then the two matrix products of the backward while
they are still there. Memory is the block and the gradient of the weight, whatever the number of tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loongforge.kernels.cross_entropy.rows import losses, to_gradient

BLOCK_BYTES = 64 << 20
"""Size of a block of fp32 logits. Below 16 MiB the products get too thin and the weight gradient is summed too often;
above 64 MiB there is nothing left to gain: measured at V 8192 and 32000."""

MIN_ROWS = 16
"""Fewest tokens in a block, however large the vocabulary."""


class _Result(NamedTuple):
    loss: Tensor
    dhidden: Tensor | None
    dweight: Tensor | None


def _pass(
    hidden: Tensor, weight: Tensor, index: Tensor, factor: Tensor, need: tuple[bool, bool], block_bytes: int
) -> _Result:
    """Losses `[T]`, and the gradients that `need` names (hidden, weight) of sum(factor * loss); factor `[T, 1]`."""
    tokens, vocab = hidden.shape[0], weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    narrow = hidden.dtype != wide
    blocks = max(1, -(-tokens // max(MIN_ROWS, block_bytes // (4 * vocab))))
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
        loss[part] = losses(probabilities.copy_(raw) if narrow else raw, index[part], probabilities)
        if not any(need):
            continue
        gradient = to_gradient(probabilities, index[part], loss[part], factor[part])
        dlogits = raw.copy_(gradient) if narrow else gradient
        if dhidden is not None:
            torch.mm(dlogits, weight, out=dhidden[part])
        if dweight is not None and dweight.dtype == hidden.dtype:
            dweight.addmm_(dlogits.t(), some, beta=0 if at == 0 else 1)  # beta 0 ignores what was there
        elif dweight is not None and at == 0:
            dweight.copy_(dlogits.t() @ some)
        elif dweight is not None:
            dweight.add_(dlogits.t() @ some)
    return _Result(loss.squeeze(1), dhidden, dweight)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, index: Tensor, kept: Tensor, token_weight: Tensor, grad: bool,
        block_bytes: int,
    ) -> Tensor:  # fmt: skip
        need = (grad and ctx.needs_input_grad[0], grad and ctx.needs_input_grad[1])
        factor = (token_weight * kept).unsqueeze(1)
        result = _pass(hidden, weight, index, factor, need, block_bytes)
        ctx.need, ctx.block_bytes = need, block_bytes
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
        if gradients is None or scale is None:
            _, dhidden, dweight = _pass(hidden, weight, index, grad, ctx.need, ctx.block_bytes)
        else:
            dhidden, dweight = (None if one is None else one.mul_(scale) for one in gradients)
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None, None, None


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
    loss = _LinearCrossEntropy.apply(rows, weight, index, kept, counted, torch.is_grad_enabled(), block_bytes)
    return loss.view(labels.shape)
