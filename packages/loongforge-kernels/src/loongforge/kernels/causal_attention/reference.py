"""Causal attention as it is written down: all scores at once."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """output `[B, H, S, D]`; see the package."""
    heads = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(heads, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(
        1 + key.shape[2] - query.shape[2]
    )
    return torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1) @ value
