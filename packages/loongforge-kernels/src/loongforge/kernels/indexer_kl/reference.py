"""How far an indexer's scores are from what attention did, as it is written down, and the gradient in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(scores: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each row `[T]`, differentiable by torch: the truth; see the package."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    valid = scores != float("-inf")
    weight = target.detach().to(wide).masked_fill(~valid, 0.0)
    total = weight.sum(-1, keepdim=True)
    some = total > 0
    share = weight / total.where(some, 1.0)
    logs = torch.log_softmax(scores.to(wide).masked_fill(~valid & some, float("-inf")).masked_fill(~some, 0.0), -1)
    return (torch.xlogy(share, share) - share * logs.masked_fill(~valid, 0.0)).sum(-1)


def indexer_divergence(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence, log-sum-exp of the scores (-inf without keys), and sum of the target: each `[T]`."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    total = target.to(wide).masked_fill(scores == float("-inf"), 0.0).sum(-1)
    return divergence(scores, target), torch.logsumexp(scores.to(wide), -1), total


def indexer_divergence_backward(scores: Tensor, target: Tensor, lse: Tensor, total: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the scores `[T, K]`: softmax minus normalized target, times the row's gradient."""
    valid = (scores != float("-inf")) & (total > 0)[:, None]
    softmax = torch.exp(scores.to(lse.dtype) - lse.where(lse > float("-inf"), 0.0)[:, None])
    share = target.to(lse.dtype) / total.where(total > 0, 1.0)[:, None]
    return ((softmax - share) * grad[:, None]).masked_fill(~valid, 0.0).to(scores.dtype).contiguous()


def reduced(rows: Tensor, seen: Tensor, row_weight: Tensor | None, reduction: str) -> Tensor:
    """Rows of divergence to one number, or weighted rows; `seen` says which rows have keys."""
    weight = seen.to(rows.dtype) if row_weight is None else row_weight.to(rows.dtype) * seen
    if reduction == "none":
        return rows * weight
    if reduction == "sum":
        return (rows * weight).sum()
    if reduction == "mean":
        total = weight.sum()
        return (rows * weight).sum() / total.where(total > 0, 1.0)
    raise ValueError(f"reduction={reduction!r} is not 'mean', 'sum' or 'none'")


def indexer_kl(scores: Tensor, target: Tensor, row_weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Divergence over all rows; see the package."""
    seen = (scores > float("-inf")).any(-1)
    return reduced(divergence(scores, target), seen, row_weight, reduction)
