"""RMS norm as one Triton kernel each way; rows live in registers, everything between load and store is fp32.

A program has one long row or several short ones at a time, as of query and key norms. The backward writes one partial
weight gradient per program, summed by torch: no atomics, so it is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from loongforge.kernels.tiles import adjacent

MAX_COLUMNS = 65536
"""Longest row that one program holds."""
TILE = 2048
"""Numbers in a program's rows, when several fit: 16 for each of 128 threads, 32 bytes in 16-bit types."""
BACKWARD_WARPS = 4096
"""Warps of all programs of the backward together, 31 for each multiprocessor of an H200: so many loads are in flight,
and so few partial weight gradients are there."""


@triton.jit
def _forward(
    x_ptr, weight_ptr, y_ptr, scale_ptr, rows, columns, x_stride, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / columns + eps)  # [ROWS]
    tl.store(scale_ptr + row, scale, mask=row < rows)
    y = x * scale[:, None] * weight[None, :]
    tl.store(y_ptr + row[:, None] * columns + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_ptr, x_ptr, weight_ptr, scale_ptr, dx_ptr, dweight_ptr, rows, columns, x_stride, grad_stride, turns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for turn in range(turns):
        row = (program * turns + turn) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        unit = x * scale
        dweight += grad * unit
        grad *= weight[None, :]
        dx = scale * (grad - unit * (tl.sum(grad * unit, axis=1) / columns)[:, None])
        tl.store(dx_ptr + row[:, None] * columns + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + program * columns + column, tl.sum(dweight, axis=0), mask=column < columns)


def _cut(columns: int) -> dict[str, int]:
    """Rows at a time, block and warps for rows of this length."""
    block = triton.next_power_of_2(columns)
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // 512))}


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, weight = adjacent(x.reshape(-1, x.shape[-1])), weight.contiguous()
        count, columns = rows.shape
        y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        scale = torch.empty(count, dtype=torch.float32, device=x.device)
        cut = _cut(columns)
        if count:
            launch: Any = _forward[(triton.cdiv(count, cut["ROWS"]),)]  # num_warps is the launch's, not the kernel's
            launch(rows, weight, y, scale, count, columns, rows.stride(0), eps, **cut)
        ctx.save_for_backward(rows, weight, scale)
        ctx.shape = x.shape
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, scale = ctx.saved_tensors
        count, columns = rows.shape
        dx = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        if not count:
            return dx.view(ctx.shape), torch.zeros_like(weight), None
        cut = _cut(columns)
        tiles = triton.cdiv(count, cut["ROWS"])
        turns = triton.cdiv(tiles, BACKWARD_WARPS // cut["num_warps"])
        programs = triton.cdiv(tiles, turns)
        partial = torch.empty(programs, columns, dtype=torch.float32, device=rows.device)
        given = adjacent(grad.reshape(rows.shape))
        launch: Any = _backward[(programs,)]
        launch(
            given, rows, weight, scale, dx, partial, count, columns, rows.stride(0), given.stride(0), turns, **cut
        )  # fmt: skip
        return dx.view(ctx.shape), partial.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """y `[..., H]` from x `[..., H]` and weight `[H]`, H at most 65536; see the package."""
    assert x.shape[-1] <= MAX_COLUMNS, f"rms_norm: rows of {x.shape[-1]}, at most {MAX_COLUMNS}; use the eager one"
    return _RmsNorm.apply(x, weight, eps)
