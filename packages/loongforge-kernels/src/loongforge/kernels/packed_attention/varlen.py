"""Attention of packed parts by torch's kernels for rows of many lengths: one launch, however many parts."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from loongforge.kernels.packed_attention.parts import Parts

CAUSAL = (-1, 0)
"""Window of keys (left, right) of the last one a query sees: all before it, none behind it."""
WHOLE = (-1, -1)
MAX_WIDTH = 256
"""Widest head of FlashAttention 2."""


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, parts: Parts, scale: float, causal: bool = True
) -> Tensor:
    """output `[T, H, D]`, D at most 256; see the package."""
    assert query.shape[-1] <= MAX_WIDTH, f"heads of {query.shape[-1]} columns, at most {MAX_WIDTH}; use sdpa"
    output: Any = varlen_attn(  # a pair where its statistics are asked for
        query, key, value, parts.query_ends, parts.key_ends, max(parts.queries), max(parts.keys), scale=scale,
        window_size=CAUSAL if causal else WHOLE, **_grouped(query, key),
    )  # fmt: skip
    return output


def _grouped(query: Tensor, key: Tensor) -> dict[str, Any]:
    """torch 2.11 takes fewer key heads without being told, later ones ask for it."""
    fewer = key.shape[1] != query.shape[1]
    return {"enable_gqa": True} if fewer and "enable_gqa" in signature(varlen_attn).parameters else {}
