"""`select_topk(logits, ks, ke, topk) -> Selection`: the keys with the largest logits of each row, exactly.

logits `[T, S]` floating and not NaN; ks and ke int32 `[T]` bound each row's keys, `ks[t] <= s < ke[t]`, within
`[0, S]`. Among equal logits, and -0 equals +0, the lowest key comes first: relu makes many exact zeros, and ranks and
recomputation must choose the same. A row with fewer than topk keys takes them all; topk may exceed S. Equation 2 of
DeepSeek-V3.2. Not differentiable: `lightning_indexer` is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loongforge.kernels.library import define
from loongforge.kernels.select_topk import reference
from loongforge.kernels.select_topk.reference import Selection as Selection


def _select(logits: Tensor, ks: Tensor, ke: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    indices, scores, length = reference.select_topk(logits, ks, ke, topk)
    return indices, scores, length


def _fake(logits: Tensor, ks: Tensor, ke: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    indices = logits.new_empty(rows, topk, dtype=torch.int32)
    return indices, logits.new_empty(rows, topk), logits.new_empty(rows, dtype=torch.int32)


_op = define(_select, name="select_topk", cuda="loongforge.kernels.select_topk.triton:select_topk", fake=_fake)


@torch.no_grad()
def select_topk(logits: Tensor, ks: Tensor, ke: Tensor, topk: int) -> Selection:
    """Indices, scores and length of the selection from logits `[T, S]`; see the package."""
    return Selection(*_op(logits, ks, ke, topk))
