"""The lightning indexer in torch, some queries at a time; torch differentiates its scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loongforge.kernels.fp8.reference import hadamard_quant
from loongforge.kernels.gather_scores.reference import gather_scores
from loongforge.kernels.indexer_logits.reference import indexer_logits
from loongforge.kernels.select_topk.reference import Selection, select_topk

CHUNK_BYTES = 1 << 30
"""Of logits that exist at a time, when the caller does not say."""
WIDTH = 128
"""Of the rows that fp8 rotates."""


def lightning_indexer(
    q: Tensor, k: Tensor, w: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    relu: bool = True, fp8: bool = False, chunk_rows: int | None = None, deterministic: bool = False,
) -> Selection:  # fmt: skip
    """The selection of topk keys for each row of q `[T, H, D]` from k `[S, D]`; see the package."""
    chunk = chunk_of(len(q), len(k), chunk_rows)
    if not fp8:
        return select(q, k, w, ks, ke, topk, relu, chunk)
    with torch.no_grad():
        narrow_q, narrow_k, wide_w, k_scale = quantised(q, k, w, hadamard_quant)
        found = select(narrow_q, narrow_k, wide_w, ks, ke, topk, relu, chunk, k_scale)
    return found._replace(scores=gather_scores(q, k, w, found.indices, relu=relu))


def select(
    q: Tensor, k: Tensor, w: Tensor, ks: Tensor, ke: Tensor, topk: int, relu: bool, chunk: int,
    k_scale: Tensor | None = None,
) -> Selection:  # fmt: skip
    """Top-k of the logits of `chunk` queries at a time; q and k may be fp8, as `indexer_logits` takes them."""
    parts: list[Selection] = []
    for rows in (slice(start, start + chunk) for start in range(0, max(1, len(q)), chunk)):
        logits = indexer_logits(q[rows], k, w[rows], ks[rows], ke[rows], relu=relu, k_scale=k_scale)
        indices, scores, length = select_topk(logits.detach(), ks[rows], ke[rows], topk)
        if len(k):
            scores = logits.gather(1, indices.clamp_min(0).long()).masked_fill(indices < 0, float("-inf"))
        parts.append(Selection(indices, scores, length))
    return parts[0] if len(parts) == 1 else Selection(*(torch.cat(part) for part in zip(*parts, strict=True)))


def quantised(
    q: Tensor, k: Tensor, w: Tensor, quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k rotated, as float8_e4m3fn, w fp32 with q's scales in it, and k's scales fp32 `[S]`."""
    if q.shape[-1] != WIDTH:
        raise ValueError(
            f"lightning_indexer: fp8=True rotates rows of {WIDTH} numbers, q and k have {q.shape[-1]}: leave fp8 out."
        )
    (q, q_scale), (k, k_scale) = quantise(q), quantise(k)
    return q, k, w.float() * q_scale, k_scale


def chunk_of(queries: int, keys: int, chunk_rows: int | None) -> int:
    """Queries to take at a time; `ValueError` when fewer than one are asked for."""
    if chunk_rows is None:
        return max(1, CHUNK_BYTES // (4 * max(1, keys)))
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows!r} must be at least 1, or None for 1 GiB of logits at a time.")
    return chunk_rows
