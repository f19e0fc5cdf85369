"""One launch for all groups: torch's grouped matrix product, forward and for both gradients.

It wants the matrices side by side. They are copied there for each call: 4 bytes moved for every weight in 16 bits,
beside 2 operations for each of its group's rows; they are not kept for the backward pass, which copies again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from loongforge.kernels.grouped_linear.eager import grouped_linear as one_by_one
from loongforge.kernels.sending import sent

_ROW = 16
"""Bytes that the rows of all matrices are multiples of in torch's kernels, which take no matrix without rows either."""


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...], *weights: Tensor) -> Tensor:
        ends = sent(torch.tensor(list(accumulate(counts)), dtype=torch.int32), x.device)
        ctx.counts = counts
        ctx.save_for_backward(x, ends, *weights)
        return F.grouped_mm(x, torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, ends, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        dx = F.grouped_mm(grad, torch.stack(weights), offs=ends) if ctx.needs_input_grad[0] else None
        dweights: list[Tensor | None] = [None] * len(weights)
        if any(ctx.needs_input_grad[2:]):
            # What a kernel leaves in the matrix of a group without rows is not specified.
            found = F.grouped_mm(grad.t(), x, offs=ends).unbind()
            dweights = [one if count else torch.zeros_like(one) for one, count in zip(found, ctx.counts, strict=True)]
        return dx, None, *dweights


def grouped_linear(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """y `[T, N]`; see the package. Rows that are no multiples of 16 bytes go through one product for each group."""
    if not len(x) or any(width * x.element_size() % _ROW for width in weights[0].shape):
        return one_by_one(x, weights, counts)
    return _GroupedLinear.apply(x.contiguous(), tuple(counts), *weights)
