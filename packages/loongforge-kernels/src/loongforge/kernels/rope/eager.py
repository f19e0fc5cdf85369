"""Rotary position embedding in torch ops; the backward is the same turn with the angle negated, and keeps no x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Turn = Callable[[Tensor, Tensor, Tensor, bool, int], Tensor]
"""x turned by the angles of cos and sin times 1 or -1, with pairs of columns side by side or half a row apart."""


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int) -> Tensor:
    half = cos.shape[-1]
    y = torch.empty_like(x)
    if interleaved:
        columns = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    else:
        columns = (slice(0, half), slice(half, 2 * half))
    first, second = (x[..., part] for part in columns)
    out_first, out_second = (y[..., part] for part in columns)
    if cos.dtype == x.dtype:
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    else:  # the wider type until the one rounding at the end
        out_first.copy_((first * cos).addcmul_(second.to(cos.dtype), sin, value=-sign))
        out_second.copy_((second * cos).addcmul_(first.to(cos.dtype), sin, value=sign))
    if 2 * half < x.shape[-1]:
        y[..., 2 * half :] = x[..., 2 * half :]
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, turn: Turn) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.turn = interleaved, turn
        return turn(x, cos, sin, interleaved, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ctx.turn(grad, cos, sin, ctx.interleaved, -1), None, None, None, None


def by(turn: Turn, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The op by one way of turning; fails for what none turns."""
    assert 2 * cos.shape[-1] <= x.shape[-1], f"cos has {cos.shape[-1]} pairs, x only {x.shape[-1]} columns"
    assert not cos.requires_grad, "rope is differentiable in x alone"
    assert not sin.requires_grad, "rope is differentiable in x alone"
    assert torch.promote_types(x.dtype, cos.dtype) == cos.dtype, f"cos {cos.dtype} is narrower than x {x.dtype}"
    return _Rope.apply(x, cos, sin, interleaved, turn)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """y like x; see the package."""
    return by(_turn, x, cos, sin, interleaved)
