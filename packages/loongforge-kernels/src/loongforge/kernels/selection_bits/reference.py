"""A selection as bits, in torch: through a mask with a column for every key."""

from __future__ import annotations

import torch
from torch import Tensor


def selection_bits(indices: Tensor, keys: int) -> Tensor:
    """bits int32 `[T, ceil(keys / 32)]` from indices `[T, K]`; see the package."""
    words = (keys + 31) // 32
    mask = torch.zeros(len(indices), 32 * words + 1, dtype=torch.bool, device=indices.device)
    valid = (indices >= 0) & (indices < keys)
    mask.scatter_(1, indices.long().where(valid, 32 * words), True)  # the last column takes what is no key
    weight = torch.tensor([*(1 << bit for bit in range(31)), -(1 << 31)], dtype=torch.int32, device=indices.device)
    return (mask[:, :-1].view(len(indices), words, 32) * weight).sum(-1, dtype=torch.int32)
