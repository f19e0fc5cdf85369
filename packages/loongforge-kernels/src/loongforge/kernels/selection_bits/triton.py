"""A selection as bits: one program per row sets them by atomic or, which no order changes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Indices that a program reads at a time."""


@triton.jit
def _set(index_ptr, bits_ptr, K, S, WORDS, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    for first in range(0, K, BLOCK):
        column = first + tl.arange(0, BLOCK)
        index = tl.load(index_ptr + t * K + column, mask=column < K, other=-1)
        valid = (index >= 0) & (index < S)
        bit = tl.full((BLOCK,), 1, tl.int32) << (index & 31)
        tl.atomic_or(bits_ptr + t * WORDS + (index >> 5), bit, mask=valid, sem="relaxed")


def selection_bits(indices: Tensor, keys: int) -> Tensor:
    """bits int32 `[T, ceil(keys / 32)]` from indices `[T, K]`; see the package."""
    words = (keys + 31) // 32
    bits = torch.zeros(len(indices), words, dtype=torch.int32, device=indices.device)
    if indices.numel():
        launch: Any = _set[(len(indices),)]
        launch(indices.contiguous(), bits, indices.shape[1], keys, words, BLOCK=BLOCK, num_warps=4)
    return bits
