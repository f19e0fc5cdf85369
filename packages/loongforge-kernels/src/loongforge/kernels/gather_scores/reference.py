"""Scores of chosen keys in torch, and the formula of their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from loongforge.kernels.indexer_logits.reference import wide


def gather_scores(
    q: Tensor, k: Tensor, w: Tensor, indices: Tensor, *, relu: bool = True, deterministic: bool = False
) -> Tensor:
    """scores `[T, K]` from q `[T, H, D]`, k `[S, D]`, w `[T, H]` and indices `[T, K]`; see the package.

    torch differentiates it. `deterministic` changes nothing here: torch's own setting decides what happens on a GPU.
    """
    chosen, valid = _gather(k.to(wide(q)), indices)
    product = torch.einsum("thd,tcd->thc", q.to(wide(q)), chosen)
    scores = torch.einsum("th,thc->tc", w.to(wide(q)), product.relu() if relu else product)
    return scores.masked_fill(~valid, float("-inf"))


def gather_scores_backward(
    grad: Tensor, q: Tensor, k: Tensor, w: Tensor, indices: Tensor, relu: bool, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and w, each in its dtype, from that of the scores `[T, K]`."""
    wide_q, wide_w = q.to(wide(q)), w.to(wide(q))
    chosen, valid = _gather(k.to(wide(q)), indices)
    grad = grad.to(wide(q)).masked_fill(~valid, 0.0)
    product = torch.einsum("thd,tcd->thc", wide_q, chosen)
    slope = grad[:, None, :] * wide_w[:, :, None]  # [T, H, K], the gradient of the product
    if relu:
        slope = slope * (product > 0)
        product = product.relu()
    dq = torch.einsum("thc,tcd->thd", slope, chosen)
    dw = torch.einsum("thc,tc->th", product, grad)
    dk = torch.zeros_like(k, dtype=wide(q))
    rows = indices.long().where(valid, 0).flatten()
    if len(k):
        dk.index_add_(0, rows, torch.einsum("thc,thd->tcd", slope, wide_q).flatten(0, 1))
    return dq.to(q.dtype), dk.to(k.dtype), dw.to(w.dtype)


def _gather(k: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen keys `[T, K, D]`, zeros in empty columns, and which columns are not empty, bool `[T, K]`."""
    valid = (indices >= 0) & (indices < len(k))
    if not len(k):
        return k.new_zeros(*indices.shape, k.shape[1]), valid
    return k[indices.long().where(valid, 0)].masked_fill(~valid[..., None], 0.0), valid
