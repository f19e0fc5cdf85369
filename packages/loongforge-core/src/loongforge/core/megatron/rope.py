"""Rotary embedding through `loongforge.kernels.rope`, in the two forms megatron-core's fused hook has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from loongforge.kernels.rope import rope

Rope = Callable[..., torch.Tensor]
"""An implementation of `loongforge.kernels.rope`."""


def apply_rope(query: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False, turn: Rope = rope) -> torch.Tensor:
    """Turn `[S, B, N, D]` by the angles `[S, 1 or B, 1, R]`, whose halves repeat (pairs repeat when interleaved)."""
    pairs = freqs[..., ::2] if interleaved else freqs[..., : freqs.size(-1) // 2]
    return turn(query, pairs.cos(), pairs.sin(), interleaved)


def apply_rope_packed(
    query: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    cp_size: int = 1,
    cp_rank: int = 0,
    interleaved: bool = False,
    turn: Rope = rope,
) -> torch.Tensor:
    """The same for packed rows `[T, N, D]`, T tokens of this rank.

    Angles `[1, T, 1, R]` are each token's own; others are by place, and places begin at 0 in every segment.
    """
    if of_each_token(query, freqs):
        return apply_rope(query.unsqueeze(1), freqs.transpose(0, 1), interleaved, turn).squeeze(1)
    own = freqs[_places(cu_seqlens, query.size(0), cp_size, cp_rank)]
    return apply_rope(query.unsqueeze(1), own, interleaved, turn).squeeze(1)


def _places(ends: torch.Tensor, tokens: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Place in its segment of each token of this rank, int64 `[T]`; no number of the device is waited for.

    A rank has two chunks of every segment, one from its front and one from its back (`context_parallel.local_indices`).
    """
    ends = ends.long() // cp_size
    token = torch.arange(tokens, device=ends.device)
    segment = torch.searchsorted(ends, token, right=True) - 1
    place = token - ends[segment]
    if cp_size == 1:
        return place
    chunk = (ends[segment + 1] - ends[segment]) // 2
    return torch.where(place < chunk, place + cp_rank * chunk, place + (2 * cp_size - 2 - cp_rank) * chunk)


def of_each_token(query: torch.Tensor, freqs: torch.Tensor) -> bool:
    """Whether these are not angles by place: `[S, B, 1, R]` for `[S, B, N, D]` or `[1, T, 1, R]` for `[T, N, D]`."""
    return freqs.size(1) == query.size(1 if query.dim() == 4 else 0) and freqs.size(1) > 1


def unless_of_each_token(fused: Rope, turn: Rope = rope) -> Rope:
    """`fused` with the signature of `apply_rope`, which stands in where angles are each token's own."""

    def either(query: torch.Tensor, freqs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        ours = partial(apply_rope, turn=turn)
        return (ours if of_each_token(query, freqs) else fused)(query, freqs, *args, **kwargs)

    return either


def unless_of_each_token_packed(fused: Rope, turn: Rope = rope) -> Rope:
    """The same for packed rows."""

    def either(query: torch.Tensor, ends: torch.Tensor, freqs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        ours = partial(apply_rope_packed, turn=turn)
        return (ours if of_each_token(query, freqs) else fused)(query, ends, freqs, *args, **kwargs)

    return either
