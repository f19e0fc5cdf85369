"""FP8 products: operands quantised by a recipe, and who multiplies them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from loongforge.kernels.fp8.blocks import (
    dequantize,
    quantize_1x128,
    quantize_128x128,
    quantize_rowwise,
    quantize_tensorwise,
)
from loongforge.kernels.fp8.shape import GemmShape, Recipe


@dataclass(frozen=True, slots=True)
class Operand:
    """A quantised matrix `[rows, contraction]`."""

    q: Tensor
    scale: Tensor
    """fp32, one for each block."""
    block: tuple[int, int]
    """Rows and columns that share a scale."""

    def rows(self, first: int, last: int) -> Operand:
        """Rows first to last - 1, of blocks that are one row or all rows high."""
        scale = self.scale[first:last] if self.block[0] == 1 else self.scale
        height = 1 if self.block[0] == 1 else last - first
        return Operand(self.q[first:last], scale, (height, self.block[1]))

    def dequantized(self) -> Tensor:
        """fp32 `[rows, contraction]`."""
        return dequantize(self.q, self.scale, self.block)


def quantise(x: Tensor, recipe: Recipe, *, weight: bool = False) -> Operand:
    """x `[rows, contraction]`, of any strides, by a recipe."""
    if recipe == "tensorwise":
        return Operand(*quantize_tensorwise(x), (x.shape[0], x.shape[1]))
    if recipe == "rowwise":
        return Operand(*quantize_rowwise(x), (1, x.shape[1]))
    if weight:
        return Operand(*quantize_128x128(x), (128, 128))
    return Operand(*quantize_1x128(x), (1, 128))


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Who multiplies: `product(left [M, K], right [N, K], recipe)` is bf16 `[M, N]`, left times right's transpose."""

    name: str
    product: Callable[[Operand, Operand, Recipe], Tensor]
    emulated: bool = False
    """Whether the product is an imitation whose time says nothing."""

    def weights(self, shape: GemmShape, w: Tensor) -> list[Operand]:
        """The quantised matrices of w `[groups, N, K]`, along the dimension that the op contracts."""
        return [quantise(one if shape.op == "fprop" else one.T, shape.recipe, weight=True) for one in w]

    def step(self, shape: GemmShape, left: Tensor, right: Tensor | Sequence[Operand]) -> list[Tensor]:
        """What a micro-batch computes, quantising all but weights: y `[M, N]` of x and weights, dx `[M, K]` of dy and
        weights, or of dy and x dw `[N, K]` of each group."""
        ends = boundaries(shape)
        if isinstance(right, Tensor):
            pairs = [
                (quantise(left[a:b].T, shape.recipe), quantise(right[a:b].T, shape.recipe)) for a, b in pairwise(ends)
            ]
            return [self.product(*pair, shape.recipe) for pair in pairs]
        whole = quantise(left, shape.recipe)
        if shape.groups == 1:
            return [self.product(whole, right[0], shape.recipe)]
        rows = [whole.rows(a, b) for a, b in pairwise(ends)]
        return [torch.cat([self.product(one, other, shape.recipe) for one, other in zip(rows, right, strict=True)])]


def boundaries(shape: GemmShape) -> list[int]:
    """First row of each group, and M: sixteens of rows, the least that FP8 products contract, are dealt evenly, and the
    last group has what is over; where there are too few for that, single rows are dealt."""
    unit = 16 if shape.m >= 16 * shape.groups else 1
    return [*(shape.m // unit * group // shape.groups * unit for group in range(shape.groups)), shape.m]


def _emulated(left: Operand, right: Operand, recipe: Recipe) -> Tensor:
    return (left.dequantized() @ right.dequantized().T).bfloat16()


def _scaled(left: Operand, right: Operand, recipe: Recipe) -> Tensor:
    """`torch.nn.functional.scaled_mm`, which takes scales of blocks in the layouts of cuBLAS."""
    if not hasattr(F, "scaled_mm"):
        raise RuntimeError(f"torch {torch.__version__} has no scaled_mm, torch 2.10 or later is needed.")
    kinds = F.ScalingType
    if recipe == "blockwise":
        square = right.block == (128, 128)
        other = kinds.BlockWise128x128 if square else kinds.BlockWise1x128
        scales = [_columns(left.scale), _squares(right.scale) if square else _columns(right.scale)]
        chosen = (kinds.BlockWise1x128, other)
    else:
        scales = [left.scale, right.scale.T]
        chosen = (kinds.RowWise, kinds.RowWise) if recipe == "rowwise" else (kinds.TensorWise, kinds.TensorWise)
    return F.scaled_mm(left.q, right.q.T, scales[0], chosen[0], scales[1], chosen[1], output_dtype=torch.bfloat16)


def _columns(scale: Tensor) -> Tensor:
    """Scales `[M, K / 128]` with the rows side by side."""
    return scale.T.contiguous().T


def _squares(scale: Tensor) -> Tensor:
    """Scales `[N / 128, K / 128]` transposed, their columns padded to multiples of 4."""
    return F.pad(scale, (0, -scale.shape[1] % 4)).T


EMULATED = Engine(name="emulated: fp32 products of dequantised operands", product=_emulated, emulated=True)
"""Runs everywhere."""
TORCH = Engine(name="torch scaled_mm, one product for each group", product=_scaled)
"""torch 2.10 and FP8 matrix units: Hopper, and Ada and Blackwell but for the recipe blockwise."""
