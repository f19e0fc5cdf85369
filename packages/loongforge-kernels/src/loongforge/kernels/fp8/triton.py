"""Quantisation by blocks: one program reads a tile once and writes its scales and numbers, transposed when asked."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""Rows of 128 numbers that a program quantises."""


@triton.jit
def _scale(largest, eps, POW2: tl.constexpr):
    scale = tl.div_rn(tl.maximum(largest, eps), 448.0)
    if POW2:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _round(x, scale):
    q = tl.div_rn(x, scale)
    return tl.minimum(tl.maximum(q, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def _blocks(
    x_ptr, q_ptr, scale_ptr, M, N, m_stride, n_stride, eps,
    ROWS: tl.constexpr, SQUARE: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """q `[M, N]` is contiguous; strides are those of x, and so transpose it."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (m < M)[:, None] & (n < N)[None, :]
    x = tl.load(x_ptr + m[:, None] * m_stride + n[None, :] * n_stride, mask=inside, other=0.0).to(tl.float32)
    if SQUARE:
        scale = _scale(tl.max(tl.max(tl.abs(x), 1), 0), eps, POW2)
        tl.store(scale_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)
        q = _round(x, scale)
    else:
        scales = _scale(tl.max(tl.abs(x), 1), eps, POW2)  # [ROWS]
        tl.store(scale_ptr + m * tl.num_programs(1) + tl.program_id(1), scales, mask=m < M)
        q = _round(x, scales[:, None])
    tl.store(q_ptr + m[:, None] * N + n[None, :], q, mask=inside)


@triton.jit
def _cast(
    x_ptr, largest_ptr, q_ptr, scale_ptr, M, N, m_stride, n_stride, eps,
    ROWS: tl.constexpr, WHOLE: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """With the largest magnitude of each row, or of all of x, known."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (m < M)[:, None] & (n < N)[None, :]
    x = tl.load(x_ptr + m[:, None] * m_stride + n[None, :] * n_stride, mask=inside, other=0.0).to(tl.float32)
    row = m * 0 if WHOLE else m
    scales = _scale(tl.load(largest_ptr + row, mask=m < M, other=0.0).to(tl.float32), eps, POW2)  # [ROWS]
    if tl.program_id(1) == 0:  # where one scale is for all of x, every row has the same
        tl.store(scale_ptr + row, scales, mask=m < M)
    tl.store(q_ptr + m[:, None] * N + n[None, :], _round(x, scales[:, None]), mask=inside)


@triton.jit
def _hadamard(
    x_ptr, q_ptr, scale_ptr, M, eps, ROWS: tl.constexpr, ROTATE: tl.constexpr, POW2: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, 128)
    inside = (m < M)[:, None] & (n < 128)[None, :]
    x = tl.load(x_ptr + m[:, None] * 128 + n[None, :], mask=inside, other=0.0)
    if ROTATE:
        ones = n[:, None] & n[None, :]  # an entry is -1 where its row and column share an odd number of ones
        ones ^= ones >> 4
        ones ^= ones >> 2
        ones ^= ones >> 1
        matrix = (1 - 2 * (ones & 1)).to(tl.float32).to(x.dtype)  # the interpreter knows no int to bf16
        wide = tl.dot(x, matrix, input_precision="ieee") * 0.08838834764831845  # 128 ** -0.5
    else:
        wide = x.to(tl.float32)
    scale = _scale(tl.max(tl.abs(wide), 1), eps, POW2)
    tl.store(scale_ptr + m, scale, mask=m < M)
    tl.store(q_ptr + m[:, None] * 128 + n[None, :], _round(wide, scale[:, None]), mask=inside)


@triton.jit
def _widen(q_ptr, scale_ptr, x_ptr, M, N, scales, R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (m < M)[:, None] & (n < N)[None, :]
    q = tl.load(q_ptr + m[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + (m // R)[:, None] * scales + (n // C)[None, :], mask=inside, other=0.0)
    tl.store(x_ptr + m[:, None] * N + n[None, :], q * scale, mask=inside)


def quantize(
    x: Tensor, rows: int, columns: int, eps: float, pow2_scale: bool, transpose: bool
) -> tuple[Tensor, Tensor]:
    """q and scale of x `[M, N]`, or of its transpose, for blocks of 1 by 128, 128 by 128, a row or all of x."""
    x = x.T if transpose else x
    m, n = x.shape
    if (rows, columns) not in ((1, 128), (128, 128)):
        return _known(x, rows, columns, eps, pow2_scale)
    q = torch.empty(m, n, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(triton.cdiv(m, rows), triton.cdiv(n, 128), dtype=torch.float32, device=x.device)
    if x.numel():
        each = 128 if rows == 128 else ROWS
        launch: Any = _blocks[(triton.cdiv(m, each), triton.cdiv(n, 128))]
        launch(
            x, q, scale, m, n, x.stride(0), x.stride(1), eps,
            ROWS=each, SQUARE=rows == 128, POW2=pow2_scale, num_warps=8 if rows == 128 else 4,
        )  # fmt: skip
    return q, scale


def _known(x: Tensor, rows: int, columns: int, eps: float, pow2_scale: bool) -> tuple[Tensor, Tensor]:
    """Blocks of any width need their largest number before the first is written: x is read twice."""
    m, n = x.shape
    assert (rows, columns) in ((1, max(1, n)), (m, max(1, n))), f"quantize: blocks of {rows} x {columns}"
    q = torch.empty(m, n, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(m if rows == 1 else 1, 1, dtype=torch.float32, device=x.device)
    if x.numel():
        largest = torch.linalg.vector_norm(x, math.inf, dim=1 if rows == 1 else None)
        launch: Any = _cast[(triton.cdiv(m, ROWS), triton.cdiv(n, 128))]
        launch(
            x, largest, q, scale, m, n, x.stride(0), x.stride(1), eps,
            ROWS=ROWS, WHOLE=rows != 1, POW2=pow2_scale, num_warps=4,
        )  # fmt: skip
    return q, scale


def hadamard_quant(x: Tensor, rotate: bool, eps: float, pow2_scale: bool) -> tuple[Tensor, Tensor]:
    """q `[..., 128]` and scale `[...]` from x `[..., 128]`; see the package."""
    x = x.contiguous()
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        launch: Any = _hadamard[(triton.cdiv(scale.numel(), 64),)]
        launch(x, q, scale, scale.numel(), eps, ROWS=64, ROTATE=rotate, POW2=pow2_scale, num_warps=4)
    return q, scale


def dequantize(q: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """x fp32 `[M, N]` from q `[M, N]` and a scale for each block of rows and columns."""
    m, n = q.shape
    x = torch.empty(m, n, dtype=torch.float32, device=q.device)
    if x.numel():
        launch: Any = _widen[(triton.cdiv(m, ROWS), triton.cdiv(n, 128))]
        launch(
            q.contiguous(), scale.contiguous(), x, m, n, scale.shape[1], R=rows, C=columns, ROWS=ROWS, num_warps=4
        )  # fmt: skip
    return x
