"""SwiGLU as one Triton kernel each way: it keeps x alone and computes silu again in the backward, in fp32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024
"""Columns per program."""


@triton.jit
def _forward(x_ptr, y_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(x_ptr + row * 2 * columns + column, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(x_ptr + row * 2 * columns + columns + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad_ptr, x_ptr, dx_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = row * 2 * columns + column
    gate = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + at + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dx_ptr + at, dgate.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + at + columns, (grad * gate * sigmoid).to(dx_ptr.dtype.element_ty), mask=inside)


def _grid(rows: Tensor) -> tuple[int, int]:
    return len(rows), triton.cdiv(rows.shape[1] // 2, BLOCK)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.empty(len(rows), rows.shape[1] // 2, dtype=x.dtype, device=x.device)
        if y.numel():
            _forward[_grid(rows)](rows, y, y.shape[1], BLOCK=BLOCK)  # pyright: ignore[reportArgumentType]
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        dx = torch.empty_like(rows)
        columns = rows.shape[1] // 2
        if dx.numel():
            _backward[_grid(rows)](grad.reshape(len(rows), columns).contiguous(), rows, dx, columns, BLOCK=BLOCK)  # pyright: ignore[reportArgumentType]
        return dx.view(ctx.shape)


def swiglu(x: Tensor) -> Tensor:
    """y `[..., F]` from x `[..., 2F]`; see the package."""
    assert x.shape[-1] % 2 == 0, f"swiglu: {x.shape[-1]} columns are not gate and up of equal width"
    return _SwiGlu.apply(x)
