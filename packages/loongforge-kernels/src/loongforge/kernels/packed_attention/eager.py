"""Attention of packed parts on a CPU: each part as `causal_attention` has it, or torch where all is seen."""

from __future__ import annotations

from torch import Tensor

from loongforge.kernels.causal_attention import causal_attention
from loongforge.kernels.packed_attention import sdpa
from loongforge.kernels.packed_attention.parts import Parts


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, parts: Parts, scale: float, causal: bool = True
) -> Tensor:
    """output `[T, H, D]`; see the package."""
    if not causal:
        return sdpa.packed_attention(query, key, value, parts, scale, causal=False)
    return parts.each(lambda q, k, v: causal_attention(q, k, v, scale), query, key, value)
