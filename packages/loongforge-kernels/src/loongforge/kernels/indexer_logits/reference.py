"""Indexer logits in torch, one head after the other: no `[T, H, S]` exists. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def indexer_logits(
    q: Tensor, k: Tensor, w: Tensor, ks: Tensor, ke: Tensor, *, relu: bool = True, k_scale: Tensor | None = None
) -> Tensor:
    """logits `[T, S]` from q `[T, H, D]`, k `[S, D]` and w `[T, H]`; see the package."""
    q, k, w = (x.to(wide(q)) for x in (q, k, w))
    logits = q.new_zeros(len(q), len(k))
    for head in range(q.shape[1]):
        product = q[:, head] @ k.T  # [T, S]
        logits = logits + w[:, head, None] * (product.relu() if relu else product)
    if k_scale is not None:
        logits = logits * k_scale
    return logits.masked_fill(~seen(ks, ke, len(k)), float("-inf"))


def wide(x: Tensor) -> torch.dtype:
    """Dtype of logits: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def seen(ks: Tensor, ke: Tensor, keys: int) -> Tensor:
    """Which keys are within each row's bounds, bool `[T, keys]`."""
    key = torch.arange(keys, device=ks.device)
    return (key >= ks[:, None]) & (key < ke[:, None])
