"""SwiGLU as one Triton kernel each way: it keeps x alone and computes silu again in the backward, in fp32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2048
"""Numbers of each half in a program: 16 for each of 128 threads, 32 bytes in 16-bit types."""
BLOCK = 1024
"""Most columns of a program; the rest of its numbers are further rows."""


@triton.jit
def _forward(x_ptr, y_ptr, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    across = tl.cdiv(columns, BLOCK)  # neighbours take neighbouring columns
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]  # [ROWS, BLOCK]
    wide = at + row[:, None] * columns
    gate = tl.load(x_ptr + wide, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + wide + columns, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad_ptr, x_ptr, dx_ptr, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    across = tl.cdiv(columns, BLOCK)  # neighbours take neighbouring columns
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    wide = at + row[:, None] * columns
    gate = tl.load(x_ptr + wide, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + wide + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dx_ptr + wide, dgate.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + wide + columns, (grad * gate * sigmoid).to(dx_ptr.dtype.element_ty), mask=inside)


def _launch(kernel: Any, *tensors: Tensor, rows: int, columns: int) -> None:
    if rows and columns:
        # the largest power of two in the columns wastes no thread at their end, unless it is small
        block = min(BLOCK, triton.next_power_of_2(columns), max(128, columns & -columns))
        each = TILE // block
        grid = (triton.cdiv(rows, each) * triton.cdiv(columns, block),)
        kernel[grid](*tensors, rows, columns, ROWS=each, BLOCK=block, num_warps=4)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.empty(len(rows), rows.shape[1] // 2, dtype=x.dtype, device=x.device)
        _launch(_forward, rows, y, rows=len(rows), columns=y.shape[1])
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        dx, columns = torch.empty_like(rows), rows.shape[1] // 2
        given = grad.reshape(len(rows), columns).contiguous()
        _launch(_backward, given, rows, dx, rows=len(rows), columns=columns)
        return dx.view(ctx.shape)


def swiglu(x: Tensor) -> Tensor:
    """y `[..., F]` from x `[..., 2F]`; see the package."""
    assert x.shape[-1] % 2 == 0, f"swiglu: {x.shape[-1]} columns are not gate and up of equal width"
    return _SwiGlu.apply(x)
