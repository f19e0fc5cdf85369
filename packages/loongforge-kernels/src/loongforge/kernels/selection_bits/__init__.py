"""`selection_bits(indices, keys) -> bits`: a selection as a bit mask, which attention over whole key blocks reads.

indices int32 `[T, K]` in any order, keys the number S of key rows; bit `s % 32` of `bits[t, s // 32]`, int32
`[T, ceil(S / 32)]`, says whether query t has key s. What is not in `[0, S)` sets nothing. Not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loongforge.kernels.library import define
from loongforge.kernels.selection_bits import reference


def _fake(indices: Tensor, keys: int) -> Tensor:
    return indices.new_empty(indices.shape[0], (keys + 31) // 32, dtype=torch.int32)


_op = define(
    reference.selection_bits,
    name="selection_bits",
    cuda="loongforge.kernels.selection_bits.triton:selection_bits",
    fake=_fake,
)


def selection_bits(indices: Tensor, keys: int) -> Tensor:
    """bits int32 `[T, ceil(keys / 32)]` from indices `[T, K]`; see the package."""
    return _op(indices, keys)
