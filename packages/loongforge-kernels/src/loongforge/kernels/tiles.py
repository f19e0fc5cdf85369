"""What the Triton kernels of attention share: loading and storing rows, and how a kernel is cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
"""log2(e): the kernels compute powers of two."""
LN2 = tl.constexpr(0.6931471805599453)
"""log(2): back to natural logarithms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How one kernel is cut; autotuning chooses among these."""

    rows: int
    """Queries, or heads of one query, that one program holds."""
    keys: int
    """Keys in one turn of its loop."""
    warps: int = 8
    stages: int = 2
    """Turns whose loads are in flight."""
    swap: bool = False
    """Whether keys, not heads, are the rows of the products: Hopper's matrix instruction wants 64 rows."""


@triton.jit
def rows(base, row, inside, stride, FIRST, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of the rows `row` as `[rows, BLOCK]`; zeros outside. Addresses are int64."""
    column = tl.arange(0, BLOCK)
    mask = inside[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(base + row[:, None].to(tl.int64) * stride + FIRST + column[None, :], mask=mask, other=0.0)


@triton.jit
def put(base, row, inside, stride, value, FIRST, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store what `rows` loads, in the dtype of the memory."""
    column = tl.arange(0, BLOCK)
    mask = inside[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    at = base + row[:, None].to(tl.int64) * stride + FIRST + column[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=mask)


def adjacent(x: Tensor) -> Tensor:
    """The tensor with its columns next to each other in memory, as the kernels read them; a copy if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def require_half(op: str, x: Tensor) -> None:
    """Raise for what the kernels would compute in too few digits, or could not hold, on a GPU."""
    if x.device.type == "cuda" and x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{op} on a GPU takes bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}; "
            f"`loongforge.kernels.{op}.reference` takes any"
        )


def block(width: int) -> int:
    """Least width of a tile for a product of matrices over `width` columns."""
    return max(16, triton.next_power_of_2(width))
