"""Row bounds in torch: a search in the documents' ends; no device needs more."""

from __future__ import annotations

import torch
from torch import Tensor


def row_bounds(ends: Tensor, rows: Tensor | None = None, *, causal: bool = True) -> tuple[Tensor, Tensor]:
    """(ks, ke), int32 `[T]` each, from ends `[N + 1]` and rows `[T]`; see the package."""
    ends = ends.long()
    if rows is None:
        rows = torch.arange(int(ends[-1]), device=ends.device)
    rows = rows.to(ends.device, torch.int64)
    document = torch.searchsorted(ends, rows, right=True).clamp(1, len(ends) - 1)  # the document's end
    start, end = ends[document - 1], ends[document]
    sees = (rows >= 0) & (rows < ends[-1])
    ks = torch.where(sees, start, 0)
    ke = torch.where(sees, rows + 1 if causal else end, 0)
    return ks.int(), ke.int()


def zigzag_rows(ends: Tensor, rank: int, size: int) -> Tensor:
    """Rows int64 `[ends[-1] / size]` of a context parallel rank; see the package.

    Raises `ValueError` when a document does not divide into `2 * size` chunks.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank} must be from 0 to size - 1 = {size - 1}.")
    starts, lengths = ends[:-1].long(), ends.diff().long()
    odd = (lengths % (2 * size)).nonzero().flatten()
    if len(odd):
        have = int(lengths[odd[0]])
        raise ValueError(f"document {int(odd[0])} has {have} rows: pad it to a multiple of 2 x size = {2 * size}.")
    half = (lengths // (2 * size)).repeat_interleave(2)  # [2 N], a chunk of every document twice
    chunks = torch.tensor([rank, 2 * size - 1 - rank], device=ends.device).repeat(len(starts))
    first = starts.repeat_interleave(2) + chunks * half
    offset = torch.arange(int(half.sum()), device=ends.device) - (half.cumsum(0) - half).repeat_interleave(half)
    return first.repeat_interleave(half) + offset
