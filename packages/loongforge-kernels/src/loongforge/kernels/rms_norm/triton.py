"""RMS norm as one Triton kernel each way; a row lives in registers, everything between load and store is fp32.

The backward writes one partial weight gradient per program, summed by torch: no atomics, so it is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_COLUMNS = 65536
"""Longest row that one program holds."""
BACKWARD_PROGRAMS = 256
"""Most partial weight gradients; about two per multiprocessor of a large GPU."""


@triton.jit
def _forward(x_ptr, weight_ptr, y_ptr, scale_ptr, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / columns + eps)
    tl.store(scale_ptr + row, scale)
    tl.store(y_ptr + row * columns + column, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_ptr, x_ptr, weight_ptr, scale_ptr, dx_ptr, dweight_ptr, rows, columns, rows_each, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), dtype=tl.float32)
    first = program * rows_each
    last = tl.minimum(first + rows_each, rows)
    for row in range(first, last):
        x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        unit = x * scale
        dweight += grad * unit
        grad *= weight
        dx = scale * (grad - unit * (tl.sum(grad * unit, axis=0) / columns))
        tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + program * columns + column, dweight, mask=inside)


def _shape(columns: int) -> tuple[int, int]:
    """Block size and warps for a row."""
    block = triton.next_power_of_2(columns)
    return block, min(16, max(1, block // 512))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        weight = weight.contiguous()
        y = torch.empty_like(rows)
        scale = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        block, warps = _shape(rows.shape[1])
        if len(rows):
            launch: Any = _forward[(len(rows),)]  # num_warps belongs to the launch, not to the kernel's signature
            launch(rows, weight, y, scale, rows.shape[1], eps, BLOCK=block, num_warps=warps)
        ctx.save_for_backward(rows, weight, scale)
        ctx.shape = x.shape
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, scale = ctx.saved_tensors
        count, columns = rows.shape
        dx = torch.empty_like(rows)
        if not count:
            return dx.view(ctx.shape), torch.zeros_like(weight), None
        each = -(-count // BACKWARD_PROGRAMS)
        programs = -(-count // each)
        partial = torch.empty(programs, columns, dtype=torch.float32, device=rows.device)
        block, warps = _shape(columns)
        launch: Any = _backward[(programs,)]
        launch(
            grad.reshape(rows.shape).contiguous(), rows, weight, scale, dx, partial, count, columns, each,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return dx.view(ctx.shape), partial.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """y `[..., H]` from x `[..., H]` and weight `[H]`, H at most 65536; see the package."""
    assert x.shape[-1] <= MAX_COLUMNS, f"rms_norm: rows of {x.shape[-1]}, at most {MAX_COLUMNS}; use the eager one"
    return _RmsNorm.apply(x, weight, eps)
