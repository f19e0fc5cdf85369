"""Rotary embedding through `loongforge.kernels.rope`, in the two forms megatron-core's fused hook has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from loongforge.kernels.rope import rope

Rope = Callable[..., torch.Tensor]
"""Signature of `loongforge.kernels.rope`, or of megatron-core's hooks."""


class Rotation:
    """Both forms, by one implementation of the op.

    Layers hand over the same angles one after the other: cosines and sines are made for the first of them, and all keep
    the same ones for the backward pass.
    """

    def __init__(self, turn: Rope = rope) -> None:
        self._turn = turn
        self._made: tuple[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] | None = None

    def __call__(self, query: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        """Turn `[S, B, N, D]` by the angles `[S, 1 or B, 1, R]`, whose halves repeat (pairs when interleaved)."""
        return self._turn(query, *self._angles((freqs, interleaved), lambda: freqs), interleaved)

    def packed(
        self,
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

        def own() -> torch.Tensor:
            if of_each_token(query, freqs):
                return freqs.transpose(0, 1)
            return freqs[_places(cu_seqlens, query.size(0), cp_size, cp_rank)]

        angles = self._angles((freqs, interleaved, cu_seqlens, query.size(0), cp_size, cp_rank), own)
        return self._turn(query.unsqueeze(1), *angles, interleaved).squeeze(1)

    def _angles(self, told: tuple[Any, ...], own: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of every pair; `told`, the very objects or equal numbers, says what `own` would return."""
        if self._made is None or not _same(self._made[0], told):
            freqs, interleaved = own(), told[1]
            pairs = freqs[..., ::2] if interleaved else freqs[..., : freqs.size(-1) // 2]
            self._made = told, (pairs.cos(), pairs.sin())
        return self._made[1]


class PlainRotation:
    """megatron-core's plain rotation of a packed row, each token by its own place, all documents at once.

    Layers hand over the same documents one after the other: the places are found for the first of them.
    """

    def __init__(self, turn: Rope) -> None:
        """`turn` rotates a batch `[S, B, N, R]` by angles `[S, 1, 1, R]`."""
        self._turn = turn
        self._found: tuple[tuple[object, ...], torch.Tensor] | None = None

    def __call__(
        self, tokens: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *, cp_group: Any, **options: Any
    ) -> torch.Tensor:
        """Turn `[T, N, R]` by the angles `[longest segment or more, 1, 1, R]` by place; `options` are a batch's."""
        told = (cu_seqlens, tokens.size(0), cp_group.size(), cp_group.rank())
        if self._found is None or not _same(self._found[0], told):
            self._found = told, _places(*told)
        return self._turn(tokens.unsqueeze(1), freqs[self._found[1]], **options).squeeze(1)


def _same(left: tuple[object, ...], right: tuple[object, ...]) -> bool:
    return len(left) == len(right) and all(
        a is b or (isinstance(a, int) and a == b) for a, b in zip(left, right, strict=True)
    )


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


def unless_of_each_token(fused: Rope, ours: Rotation) -> Rope:
    """`fused` with the signature of `Rotation`, which stands in where angles are each token's own."""

    def either(query: torch.Tensor, freqs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (ours if of_each_token(query, freqs) else fused)(query, freqs, *args, **kwargs)

    return either


def unless_of_each_token_packed(fused: Rope, ours: Rotation) -> Rope:
    """The same for packed rows."""

    def either(query: torch.Tensor, ends: torch.Tensor, freqs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (ours.packed if of_each_token(query, freqs) else fused)(query, ends, freqs, *args, **kwargs)

    return either
