"""Which tokens a context parallel rank holds.

Every segment (a whole sequence, or one part of a packed row) is cut into `2 x size` chunks; rank r holds chunks r and
`2 x size - 1 - r`, so that causal attention costs the same everywhere. megatron-core's rotary embedding assumes this
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch


def local_indices(boundaries: Sequence[int], rank: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """Global positions int64 `[boundaries[-1] / size]` of this rank's tokens, in the order it holds them.

    `boundaries` are the segment ends from 0 on; every segment length is a multiple of `2 x size`. Made on `device`, on
    the host by default.
    """
    if size == 1:
        return torch.arange(boundaries[-1], device=device)
    parts: list[torch.Tensor] = []
    for start, end in pairwise(boundaries):
        half, rest = divmod(end - start, 2 * size)
        assert rest == 0, f"segment of {end - start} tokens does not divide into {2 * size} chunks"
        for chunk in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + chunk * half, start + (chunk + 1) * half, device=device))
    return torch.cat(parts)


def natural_order(boundaries: Sequence[int], size: int, device: torch.device | None = None) -> torch.Tensor:
    """Index int64 `[boundaries[-1]]` that puts the ranks' tokens, one rank after the other, into sequence order."""
    gathered = torch.cat([local_indices(boundaries, rank, size, device) for rank in range(size)])
    return torch.argsort(gathered)
