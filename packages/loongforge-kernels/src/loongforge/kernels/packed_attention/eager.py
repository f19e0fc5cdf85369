"""Attention of packed parts on a CPU: each part as `causal_attention` has it."""

from __future__ import annotations

from torch import Tensor

from loongforge.kernels.causal_attention import causal_attention
from loongforge.kernels.packed_attention.parts import Parts


def packed_attention(query: Tensor, key: Tensor, value: Tensor, parts: Parts, scale: float) -> Tensor:
    """output `[T, H, D]`; see the package."""
    return parts.each(lambda q, k, v: causal_attention(q, k, v, scale), query, key, value)
