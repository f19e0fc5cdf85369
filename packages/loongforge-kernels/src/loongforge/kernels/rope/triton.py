"""Rotary position embedding as one Triton kernel, both ways: the backward is the same turn with the angle negated.

A program takes some rows, of one head each, wherever in memory they are: a view into a larger tensor is not copied.
Angles are those of the row's position, which its other heads find in the cache. Everything between load and store is
fp32; columns beyond the turned ones pass through in the same launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loongforge.kernels.rope.eager import by
from loongforge.kernels.tiles import adjacent

PAIRS = 1024
"""Pairs of columns in a program of 128 threads: 16 bytes of each of the two in 16-bit types."""


@triton.jit
def _turn(
    x_ptr, cos_ptr, sin_ptr, y_ptr, rows, batch, heads, x_s, x_b, x_h, cos_s, cos_b, cos_h, y_s, y_b, y_h,
    SIGN: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    within = row < rows
    h, place = row % heads, row // heads
    b, s = (place % batch).to(tl.int64), (place // batch).to(tl.int64)
    x = x_ptr + (s * x_s + b * x_b + h * x_h)[:, None]  # [ROWS, 1]
    y = y_ptr + (s * y_s + b * y_b + h * y_h)[:, None]
    angle = (s * cos_s + b * cos_b + h * cos_h)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    inside = within[:, None] & (pair < HALF)
    cos = tl.load(cos_ptr + angle + pair, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    sin = tl.load(sin_ptr + angle + pair, mask=inside, other=0.0).to(tl.float32) * SIGN
    kind = y_ptr.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, :]
        both_inside = within[:, None] & (column < 2 * HALF)
        both = tl.load(x + column, mask=both_inside, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        tl.store(y + column, tl.reshape(turned, (ROWS, 2 * BLOCK)).to(kind), mask=both_inside)
    else:
        first = tl.load(x + pair, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + HALF + pair, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + pair, (first * cos - second * sin).to(kind), mask=inside)
        tl.store(y + HALF + pair, (second * cos + first * sin).to(kind), mask=inside)
    if REST > 0:
        column = tl.arange(0, BLOCK_REST)[None, :]
        passing = within[:, None] & (column < REST)
        tl.store(y + 2 * HALF + column, tl.load(x + 2 * HALF + column, mask=passing), mask=passing)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int) -> Tensor:
    """x turned by sign * angle; see the package for shapes."""
    x, half = adjacent(x), cos.shape[-1]
    y = torch.empty_like(x)
    if not x.numel():
        return y
    rows, into = _four(x), _four(y)
    cos, sin = (_four(adjacent(angle).expand(*x.shape[:-1], half)) for angle in (cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    block = triton.next_power_of_2(half)
    each = max(1, PAIRS // block)
    count, rest = x.numel() // x.shape[-1], x.shape[-1] - 2 * half
    launch: Any = _turn[(triton.cdiv(count, each),)]
    launch(
        rows, cos, sin, into, count, rows.shape[1], rows.shape[2], *rows.stride()[:3], *cos.stride()[:3],
        *into.stride()[:3], SIGN=sign, INTERLEAVED=interleaved, HALF=half, REST=rest, ROWS=each, BLOCK=block,
        BLOCK_REST=triton.next_power_of_2(max(1, rest)), num_warps=4,
    )  # fmt: skip
    return y


def _four(x: Tensor) -> Tensor:
    """x `[..., D]` with four dimensions: ones in front, or the first ones as one."""
    return x[(None,) * (4 - x.ndim)] if x.ndim <= 4 else x.flatten(0, x.ndim - 4)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """y like x; see the package. Arithmetic is in fp32."""
    return by(turn, x, cos, sin, interleaved)
