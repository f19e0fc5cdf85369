"""The lightning indexer as two kernels, logits and top-k, some queries at a time; scores are the logits' own."""

from __future__ import annotations

import torch
from torch import Tensor

from loongforge.kernels.indexer_logits.triton import indexer_logits
from loongforge.kernels.select_topk.triton import select_topk


def lightning_indexer(
    q: Tensor, k: Tensor, w: Tensor, ks: Tensor, ke: Tensor, topk: int, relu: bool, chunk: int, deterministic: bool,
    k_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """scores, indices and length; see the package."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in (slice(start, start + chunk) for start in range(0, max(1, len(q)), chunk)):
        logits = indexer_logits(q[rows], k, w[rows], ks[rows], ke[rows], relu, k_scale)
        indices, scores, length = select_topk(logits, ks[rows], ke[rows], topk)
        parts.append((scores, indices, length))
    if len(parts) == 1:
        return parts[0]
    scores, indices, length = (torch.cat(part) for part in zip(*parts, strict=True))
    return scores, indices, length
