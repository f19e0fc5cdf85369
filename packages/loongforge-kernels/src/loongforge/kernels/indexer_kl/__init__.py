"""`indexer_kl(scores, target, row_weight=None, reduction="mean") -> loss`: the loss that trains an indexer.

The Kullback-Leibler divergence of DeepSeek-V3.2's equations 3 and 4: with a the row of `target` divided by its sum and
b the softmax of the row of `scores`, `sum_k a_k (log a_k - log b_k)`. scores `[T, K]` floating, -inf where there is no
key; target `[T, K]` as `attention_target` returns it, summed over the ranks that share the heads; what it says where
scores are -inf does not count. `row_weight` `[T]` weighs rows, 0 for padding.

"none" returns each row's divergence times its weight `[T]`, "sum" their sum (the paper's), "mean" that divided by the
sum of the weights of rows that have keys. fp32, fp64 for fp64 scores. Differentiable in scores and row_weight; the
gradient of a row's scores is `b - a` without a logarithm in between, so that no small number is added to keep it
finite. A row without keys, or with a target of zeros, has loss 0 and no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loongforge.kernels.indexer_kl import reference
from loongforge.kernels.library import define


def _fake(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(scores.dtype, torch.float32)
    rows, lse, total = (scores.new_empty(len(scores), dtype=wide) for _ in range(3))
    return rows, lse, total


_forward = define(reference.indexer_divergence, cuda="loongforge.kernels.indexer_kl.triton:forward", fake=_fake)
_backward = define(
    reference.indexer_divergence_backward,
    cuda="loongforge.kernels.indexer_kl.triton:backward",
    fake=lambda scores, *rest: scores.new_empty(scores.shape),
)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, lse, total = output
    ctx.mark_non_differentiable(lse, total)
    ctx.save_for_backward(*inputs, lse, total)


def _differentiate(ctx: Any, grad: Tensor, *rest: Tensor) -> tuple[Tensor, None]:
    return _backward(*ctx.saved_tensors, grad), None


_forward.register_autograd(_differentiate, setup_context=_keep)


def indexer_kl(scores: Tensor, target: Tensor, row_weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Divergence over all rows; see the package."""
    rows, lse, _ = _forward(scores, target.detach())
    return reference.reduced(rows, lse > float("-inf"), row_weight, reduction)
