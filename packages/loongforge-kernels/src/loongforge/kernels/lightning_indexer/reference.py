"""The lightning indexer in torch, some queries at a time; torch differentiates its scores."""

from __future__ import annotations

import torch
from torch import Tensor

from loongforge.kernels.indexer_logits.reference import indexer_logits
from loongforge.kernels.select_topk.reference import Selection, select_topk

CHUNK_BYTES = 1 << 30
"""Of logits that exist at a time, when the caller does not say."""


def lightning_indexer(
    q: Tensor, k: Tensor, w: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    relu: bool = True, chunk_rows: int | None = None, deterministic: bool = False,
) -> Selection:  # fmt: skip
    """The selection of topk keys for each row of q `[T, H, D]` from k `[S, D]`; see the package."""
    chunk = chunk_of(len(q), len(k), chunk_rows)
    parts: list[Selection] = []
    for rows in (slice(start, start + chunk) for start in range(0, max(1, len(q)), chunk)):
        logits = indexer_logits(q[rows], k, w[rows], ks[rows], ke[rows], relu=relu)
        indices, scores, length = select_topk(logits.detach(), ks[rows], ke[rows], topk)
        if len(k):
            scores = logits.gather(1, indices.clamp_min(0).long()).masked_fill(indices < 0, float("-inf"))
        parts.append(Selection(indices, scores, length))
    return parts[0] if len(parts) == 1 else Selection(*(torch.cat(part) for part in zip(*parts, strict=True)))


def chunk_of(queries: int, keys: int, chunk_rows: int | None) -> int:
    """Queries to take at a time; `ValueError` when fewer than one are asked for."""
    if chunk_rows is None:
        return max(1, CHUNK_BYTES // (4 * max(1, keys)))
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows!r} must be at least 1, or None for 1 GiB of logits at a time.")
    return chunk_rows
