"""Top-k in torch: the k-th largest logit of a row, whatever is above it, and the first keys that equal it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loongforge.kernels.indexer_logits.reference import seen


class Selection(NamedTuple):
    """The keys each query attends to; K columns, of which a row uses the first `length`."""

    indices: Tensor
    """int32 `[T, K]`: key rows ascending, then -1."""
    scores: Tensor
    """`[T, K]` of the logits' dtype: their logits, then -inf."""
    length: Tensor
    """int32 `[T]`."""


def select_topk(logits: Tensor, ks: Tensor, ke: Tensor, topk: int) -> Selection:
    """Indices, scores and length of the selection from logits `[T, S]`; see the package."""
    rows, keys = logits.shape
    inside = seen(ks, ke, keys)
    length = inside.sum(1).clamp_max(topk)
    values = logits.masked_fill(~inside, float("-inf"))
    indices = torch.full((rows, topk), -1, dtype=torch.int32, device=logits.device)
    scores = logits.new_full((rows, topk), float("-inf"))
    if not topk or not keys:
        return Selection(indices, scores, length.int())
    largest = values.topk(min(topk, keys), dim=1).values
    least = largest.gather(1, (length - 1).clamp_min(0)[:, None])  # the last one taken
    above = inside & (values > least)
    level = inside & (values == least)
    wanted = (length - above.sum(1))[:, None]
    taken = above | (level & (level.cumsum(1) <= wanted))
    row, key = taken.nonzero(as_tuple=True)
    column = (taken.cumsum(1) - 1)[row, key]
    indices[row, column] = key.int()
    scores[row, column] = values[row, key]
    return Selection(indices, scores, length.int())
