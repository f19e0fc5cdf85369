"""Rotary embedding through `loongforge.kernels.rope`, in the two forms megatron-core's fused hook has."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from loongforge.core.megatron.context_parallel import local_indices
from loongforge.kernels.rope import rope


def apply_rope(query: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Turn `[S, B, N, D]` by the angles `[S, 1 or B, 1, R]`, whose halves repeat (pairs repeat when interleaved)."""
    pairs = freqs[..., ::2] if interleaved else freqs[..., : freqs.size(-1) // 2]
    return rope(query, pairs.cos(), pairs.sin(), interleaved)


def apply_rope_packed(
    query: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    cp_size: int = 1,
    cp_rank: int = 0,
    interleaved: bool = False,
) -> torch.Tensor:
    """The same for packed rows `[T, N, D]`, T tokens of this rank.

    Angles `[1, T, 1, R]` are each token's own; others are by place, and places begin at 0 in every segment.
    """
    if of_each_token(query, freqs):
        return apply_rope(query.unsqueeze(1), freqs.transpose(0, 1), interleaved).squeeze(1)
    ends = cu_seqlens.tolist()
    index = local_indices(ends, cp_rank, cp_size)
    starts = torch.cat([torch.full(((end - start) // cp_size,), start) for start, end in pairwise(ends)])
    positions = (index - starts).to(freqs.device)
    return apply_rope(query.unsqueeze(1), freqs[positions], interleaved).squeeze(1)


def of_each_token(query: torch.Tensor, freqs: torch.Tensor) -> bool:
    """Whether these are not angles by place: `[S, B, 1, R]` for `[S, B, N, D]` or `[1, T, 1, R]` for `[T, N, D]`."""
    return freqs.size(1) == query.size(1 if query.dim() == 4 else 0) and freqs.size(1) > 1


def unless_of_each_token(fused: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`fused` with the signature of `apply_rope`, which stands in where angles are each token's own."""

    def either(query: torch.Tensor, freqs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (apply_rope if of_each_token(query, freqs) else fused)(query, freqs, *args, **kwargs)

    return either


def unless_of_each_token_packed(fused: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same for packed rows."""

    def either(query: torch.Tensor, ends: torch.Tensor, freqs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (apply_rope_packed if of_each_token(query, freqs) else fused)(query, ends, freqs, *args, **kwargs)

    return either
