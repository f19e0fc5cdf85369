"""Blocks of float8_e4m3fn with one scale each, as DeepSeek-V3 trains with and releases: `x = q * scale`.

`quantize_1x128(x, *, eps=1e-12, pow2_scale=False, transpose=False) -> (q, scale)`: activations x `[M, N]`, a scale for
128 numbers of a row; q `[M, N]`, scale fp32 `[M, ceil(N / 128)]`. With `transpose` the same of x's transpose, which a
weight's gradient multiplies: q `[N, M]`, scale `[N, ceil(M / 128)]`.
`quantize_128x128(w, *, eps=1e-12, pow2_scale=False) -> (q, scale)`: weights w `[M, N]`, a scale for a square of 128;
scale `[ceil(M / 128), ceil(N / 128)]`.
`quantize_rowwise(x, *, eps=1e-12, pow2_scale=False, transpose=False) -> (q, scale)`: a scale for a row of x `[M, N]`,
`[M, 1]`; `quantize_tensorwise`, with the same arguments: one for all of x, `[1, 1]`.
`hadamard_quant(x, *, rotate=True, eps=1e-12, pow2_scale=False) -> (q, scale)`: the indexer's q and k, x `[..., 128]`,
multiplied by the Hadamard matrix over sqrt(128), which no dot product notices, then a scale for each row, fp32 `[...]`.
`dequantize(q, scale, block=(1, 128)) -> x`: fp32 `[M, N]` from q `[M, N]` and a scale for each block.

x and w are fp32, bf16 or fp16. A scale is the block's largest magnitude, at least eps, over 448, the largest e4m3; with
`pow2_scale` the next power of two, as Blackwell's scaled products take. Numbers are rounded to the nearest, ties to
even. Not differentiable: a product's backward quantises anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loongforge.kernels.fp8 import reference
from loongforge.kernels.library import define

_TRITON = "loongforge.kernels.fp8.triton"
E4M3 = torch.float8_e4m3fn


def _blocks(x: Tensor, rows: int, columns: int, eps: float, pow2_scale: bool, transpose: bool) -> tuple[Tensor, Tensor]:
    return reference.quantize(x, (rows, columns), eps, pow2_scale, transpose)


def _blocks_fake(
    x: Tensor, rows: int, columns: int, eps: float, pow2_scale: bool, transpose: bool
) -> tuple[Tensor, Tensor]:
    m, n = (x.shape[1], x.shape[0]) if transpose else (x.shape[0], x.shape[1])
    scale = x.new_empty((m + rows - 1) // rows, (n + columns - 1) // columns, dtype=torch.float32)
    return x.new_empty(m, n, dtype=E4M3), scale


def _rows(x: Tensor, rotate: bool, eps: float, pow2_scale: bool) -> tuple[Tensor, Tensor]:
    return reference.hadamard_quant(x, rotate=rotate, eps=eps, pow2_scale=pow2_scale)


def _rows_fake(x: Tensor, rotate: bool, eps: float, pow2_scale: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=E4M3), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _wide(q: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    return reference.dequantize(q, scale, (rows, columns))


def _wide_fake(q: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    return q.new_empty(q.shape, dtype=torch.float32)


_quantize = define(_blocks, name="quantize_blocks", cuda=f"{_TRITON}:quantize", fake=_blocks_fake)
_hadamard = define(_rows, name="hadamard_quant", cuda=f"{_TRITON}:hadamard_quant", fake=_rows_fake)
_dequantize = define(_wide, name="dequantize_blocks", cuda=f"{_TRITON}:dequantize", fake=_wide_fake)


@torch.no_grad()
def quantize_1x128(
    x: Tensor, *, eps: float = 1e-12, pow2_scale: bool = False, transpose: bool = False
) -> tuple[Tensor, Tensor]:
    """q `[M, N]` and scale `[M, ceil(N / 128)]` from x `[M, N]`, or those of its transpose; see the package."""
    return _quantize(x, 1, 128, eps, pow2_scale, transpose)


@torch.no_grad()
def quantize_128x128(w: Tensor, *, eps: float = 1e-12, pow2_scale: bool = False) -> tuple[Tensor, Tensor]:
    """q `[M, N]` and scale `[ceil(M / 128), ceil(N / 128)]` from w `[M, N]`; see the package."""
    return _quantize(w, 128, 128, eps, pow2_scale, False)


@torch.no_grad()
def quantize_rowwise(
    x: Tensor, *, eps: float = 1e-12, pow2_scale: bool = False, transpose: bool = False
) -> tuple[Tensor, Tensor]:
    """q `[M, N]` and scale `[M, 1]` from x `[M, N]`, or those of its transpose; see the package."""
    return _quantize(x, 1, max(1, x.shape[0 if transpose else 1]), eps, pow2_scale, transpose)


@torch.no_grad()
def quantize_tensorwise(
    x: Tensor, *, eps: float = 1e-12, pow2_scale: bool = False, transpose: bool = False
) -> tuple[Tensor, Tensor]:
    """q `[M, N]` and scale `[1, 1]` from x `[M, N]`, or those of its transpose; see the package."""
    rows, columns = reversed(x.shape) if transpose else x.shape
    return _quantize(x, max(1, rows), max(1, columns), eps, pow2_scale, transpose)


@torch.no_grad()
def hadamard_quant(
    x: Tensor, *, rotate: bool = True, eps: float = 1e-12, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """q `[..., 128]` and scale `[...]` from x `[..., 128]`; see the package."""
    if x.shape[-1] != 128:
        raise ValueError(f"hadamard_quant: rows of {x.shape[-1]} numbers, 128 is what it rotates.")
    return _hadamard(x, rotate, eps, pow2_scale)


def dequantize(q: Tensor, scale: Tensor, block: tuple[int, int] = (1, 128)) -> Tensor:
    """x fp32 `[M, N]` from q `[M, N]` and scale `[ceil(M / block[0]), ceil(N / block[1])]`; see the package."""
    want = tuple(-(-size // part) for size, part in zip(q.shape, block, strict=True))
    if tuple(scale.shape) != want:
        raise ValueError(f"dequantize: scale is {tuple(scale.shape)}, {want} is what blocks of {block} need.")
    return _dequantize(q, scale, *block)
