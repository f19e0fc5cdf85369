"""What each query of this context parallel rank's part of a row sees: calls of `packed_attention`, or a range of keys.

Shapes: T tokens of this rank, C tokens of all context parallel ranks, R the tokens of one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from loongforge.core.megatron.context_parallel import local_indices, natural_order
from loongforge.core.platform.sending import sent
from loongforge.kernels.packed_attention import Parts
from loongforge.kernels.row_bounds import row_bounds


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """One call: as many queries in every call of a row."""

    keys: torch.Tensor | None
    """int64, which of the C keys as they were gathered, rank after rank; None for all as they are."""
    parts: Parts


@dataclass(frozen=True, kw_only=True, eq=False)
class RowParts:
    """A rank has two chunks of each segment. Both see their segment from its start, so each is a part of its own; those
    of one call share no keys, which keeps the sums of a backward pass in one order."""

    order: torch.Tensor | None
    """int64 `[T]`, the queries of the first call, then those of the next; None where they stand so."""
    back: torch.Tensor | None
    """int64 `[T]`, the inverse."""
    turns: tuple[Turn, ...]

    @classmethod
    def of(cls, boundaries: Sequence[int], rank: int, size: int, device: torch.device) -> RowParts:
        """Of rank `rank` of `size`; `boundaries` are the segment ends from 0 on, of the whole row."""
        segments = [(start, end) for start, end in pairwise(boundaries) if end > start]
        if size == 1:
            lengths = [end - start for start, end in segments]
            return cls(order=None, back=None, turns=(Turn(keys=None, parts=Parts.of(lengths, lengths, device)),))
        halves = [(end - start) // (2 * size) for start, end in segments]
        gathered = natural_order(boundaries, size)
        turns = []
        for chunk in (rank, 2 * size - 1 - rank):
            seen = [half * (chunk + 1) for half in halves]
            pairs = zip(segments, seen, strict=True)
            keys = torch.cat([gathered[start : start + count] for (start, _), count in pairs])
            turns.append(Turn(keys=sent(keys, device), parts=Parts.of(halves, seen, device)))
        order = _by_chunk(halves)
        if len(segments) == 1:
            return cls(order=None, back=None, turns=tuple(turns))
        return cls(order=sent(order, device), back=sent(torch.argsort(order), device), turns=tuple(turns))


@dataclass(frozen=True, kw_only=True, eq=False)
class Sight:
    """What this rank's tokens of a row may see, for layers that choose keys."""

    boundaries: tuple[int, ...]
    """Of the documents of the whole row."""
    ks: torch.Tensor
    """First key of each token, int32 `[T]`."""
    ke: torch.Tensor
    """One past its last key."""
    rows: torch.Tensor
    """Place of each token in the row, int64 `[T]`."""
    natural: torch.Tensor | None
    """int64 `[C]`, the order of the row among what was gathered, rank after rank; None for one rank."""

    @classmethod
    def of(cls, boundaries: Sequence[int], rank: int, size: int, device: torch.device) -> Sight:
        """Of rank `rank` of `size`; `boundaries` as for `RowParts`."""
        rows = local_indices(boundaries, rank, size, device)
        ks, ke = row_bounds(sent(torch.tensor(boundaries), device), rows)
        natural = None if size == 1 else natural_order(boundaries, size, device)
        return cls(boundaries=tuple(boundaries), ks=ks, ke=ke, rows=rows, natural=natural)


def _by_chunk(halves: Sequence[int]) -> torch.Tensor:
    """Index int64 `[T]` that puts the first chunk of every segment before the second ones."""
    number = torch.cat([torch.tensor([0, 1]).repeat_interleave(half) for half in halves])
    return torch.argsort(number, stable=True)
