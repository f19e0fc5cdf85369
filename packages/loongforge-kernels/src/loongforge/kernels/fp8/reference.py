"""Quantisation by blocks in torch: the truth, and the path of every device without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0
"""Of float8_e4m3fn."""


def scales(largest: Tensor, eps: float, pow2_scale: bool) -> Tensor:
    """fp32 scales from the largest magnitudes of blocks."""
    scale = largest.float().clamp_min(eps) / LARGEST
    if not pow2_scale:
        return scale
    bits = scale.view(torch.int32)  # the next power of two is a carry out of the fraction
    return ((bits + 0x7FFFFF) & -0x800000).view(torch.float32)


def quantize(x: Tensor, block: tuple[int, int], eps: float, pow2_scale: bool, transpose: bool) -> tuple[Tensor, Tensor]:
    """q and scale of x `[M, N]`, or of its transpose, for blocks of the given rows and columns."""
    x = (x.T if transpose else x).float()
    rows, columns = (-(-size // part) for size, part in zip(x.shape, block, strict=True))
    padding = (0, columns * block[1] - x.shape[1], 0, rows * block[0] - x.shape[0])
    tiles = torch.nn.functional.pad(x, padding).view(rows, block[0], columns, block[1])
    scale = scales(tiles.abs().amax((1, 3)), eps, pow2_scale)
    q = (tiles / scale[:, None, :, None]).clamp(-LARGEST, LARGEST)
    q = q.view(rows * block[0], columns * block[1])[: x.shape[0], : x.shape[1]]
    return q.to(torch.float8_e4m3fn).contiguous(), scale


def quantize_1x128(
    x: Tensor, *, eps: float = 1e-12, pow2_scale: bool = False, transpose: bool = False
) -> tuple[Tensor, Tensor]:
    """q `[M, N]` and scale `[M, ceil(N / 128)]` from x `[M, N]`, or those of its transpose; see the package."""
    return quantize(x, (1, 128), eps, pow2_scale, transpose)


def quantize_128x128(w: Tensor, *, eps: float = 1e-12, pow2_scale: bool = False) -> tuple[Tensor, Tensor]:
    """q `[M, N]` and scale `[ceil(M / 128), ceil(N / 128)]` from w `[M, N]`; see the package."""
    return quantize(w, (128, 128), eps, pow2_scale, False)


def quantize_rowwise(
    x: Tensor, *, eps: float = 1e-12, pow2_scale: bool = False, transpose: bool = False
) -> tuple[Tensor, Tensor]:
    """q `[M, N]` and scale `[M, 1]` from x `[M, N]`, or those of its transpose; see the package."""
    return quantize(x, (1, max(1, x.shape[0 if transpose else 1])), eps, pow2_scale, transpose)


def quantize_tensorwise(
    x: Tensor, *, eps: float = 1e-12, pow2_scale: bool = False, transpose: bool = False
) -> tuple[Tensor, Tensor]:
    """q `[M, N]` and scale `[1, 1]` from x `[M, N]`, or those of its transpose; see the package."""
    rows, columns = reversed(x.shape) if transpose else x.shape
    return quantize(x, (max(1, rows), max(1, columns)), eps, pow2_scale, transpose)


def hadamard_quant(
    x: Tensor, *, rotate: bool = True, eps: float = 1e-12, pow2_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """q `[..., 128]` and scale `[...]` from x `[..., 128]`; see the package."""
    x = x.float()
    if rotate:
        x = x @ hadamard(x.shape[-1], x.device) * x.shape[-1] ** -0.5
    scale = scales(x.abs().amax(-1), eps, pow2_scale)
    return (x / scale[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def hadamard(size: int, device: torch.device) -> Tensor:
    """Sylvester's matrix fp32 `[size, size]` of +1 and -1; size a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def dequantize(q: Tensor, scale: Tensor, block: tuple[int, int] = (1, 128)) -> Tensor:
    """x fp32 `[M, N]` from q `[M, N]` and a scale for each block."""
    wide = scale.repeat_interleave(block[0], 0)[: q.shape[0]].repeat_interleave(block[1], 1)[:, : q.shape[1]]
    return q.float() * wide
