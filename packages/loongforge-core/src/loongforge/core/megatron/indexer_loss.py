"""What an indexer learns from: the shares that attention gave keys, and the loss over all of them in its warm-up.

Shapes are those of `sparse_attention`; M tokens of this tensor parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from loongforge.kernels.indexer_kl import indexer_kl
from loongforge.kernels.indexer_logits import indexer_logits

SCORE_BYTES = 1 << 28
"""Of the scores of one head that exist at a time."""


class Scored(NamedTuple):
    """What the indexer makes of one row of the batch."""

    query: torch.Tensor
    """`[M, I, E]`."""
    key: torch.Tensor
    """Of all tokens, `[C, E]`."""
    weights: torch.Tensor
    """`[M, I]`."""


def rows_at_once(keys: int) -> int:
    """Queries whose scores of so many keys are made at a time."""
    return max(1, SCORE_BYTES // (4 * keys))


def chosen_shares(
    query: torch.Tensor, key: torch.Tensor, indices: torch.Tensor, lse: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """What attention gave each chosen key, summed over heads (equation 3): `[S, K]`, 0 where the index is no key.

    query `[S, N, D]`, key `[C, N, D]`, indices int32 `[S, K]`, lse `[S, N]`. What
    `loongforge.kernels.attention_target` computes from absorbed queries, here from the keys of every head.
    """
    parts: list[torch.Tensor] = []
    for part in _parts(len(query), rows_at_once(len(key))):
        place = indices[part].clamp_min(0).long()
        total = sum(one.gather(1, place) for one in _head_shares(query[part], key, lse[part], scale))
        assert isinstance(total, torch.Tensor), "attention has heads"
        parts.append(total.masked_fill(indices[part] < 0, 0.0))
    return torch.cat(parts)


def key_shares(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, ks: torch.Tensor, ke: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """What attention gave every key, summed over heads: `[S, C]`, 0 outside `[ks, ke)`."""
    total = sum(_head_shares(query, key, lse, scale))
    assert isinstance(total, torch.Tensor), "attention has heads"
    place = torch.arange(len(key), device=key.device)
    return total.masked_fill((place < ks[:, None]) | (place >= ke[:, None]), 0.0)


def every_key_loss(
    scored: Scored, ks: torch.Tensor, ke: torch.Tensor, shares: Callable[[slice], torch.Tensor], rows: int
) -> torch.Tensor:
    """The divergence of the scores of all keys in `[ks, ke)` from what attention gave them (equation 3), the sum over
    tokens; differentiable in what was scored.

    `shares(part)` is what attention gave, `[part, C]` for some of the M tokens; it is asked for `rows` of them at a
    time. The gradients are made with the loss, so that scores of no more than `rows` tokens exist, and none is kept.
    """
    made: Any = _EveryKeyLoss.apply(*scored, ks, ke, shares, rows)
    return made


class _EveryKeyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor, ks: torch.Tensor, ke: torch.Tensor,
        shares: Callable[[slice], torch.Tensor], rows: int,
    ) -> torch.Tensor:  # fmt: skip
        wide = weights.dtype
        gradients = [torch.zeros_like(tensor, dtype=wide) for tensor in (query, key, weights)]
        loss = weights.new_zeros(())
        for part in _parts(len(query), rows):
            scores = indexer_logits(query[part], key, weights[part], ks[part], ke[part]).requires_grad_()
            with torch.enable_grad():
                one = indexer_kl(scores, shares(part), reduction="sum")
                (slope,) = torch.autograd.grad(one, scores)
            loss += one.detach()
            _add_gradients(slope, query, key, weights, part, gradients)
        operands = (query, key, weights)
        ctx.save_for_backward(*(made.to(one.dtype) for made, one in zip(gradients, operands, strict=True)))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> Any:
        return *(made * grad[0] for made in ctx.saved_tensors), None, None, None, None


def _add_gradients(
    slope: torch.Tensor, query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor, part: slice,
    gradients: list[torch.Tensor],
) -> None:  # fmt: skip
    """Those of query, key and weights, from the scores' `[part, C]`, one head after the other."""
    of_query, of_key, of_weights = gradients
    key = key.to(slope.dtype)
    for head in range(query.size(1)):
        mine = query[part, head].to(slope.dtype)
        product = (mine @ key.t()).relu()
        of_weights[part, head] = (slope * product).sum(1)
        sloped = slope * weights[part, head, None] * (product > 0)
        of_query[part, head] = sloped @ key
        of_key += sloped.t() @ mine


def _head_shares(query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, scale: float) -> Iterator[torch.Tensor]:
    """Head by head what attention would give every key, visible or not: `[S, C]`."""
    for head in range(query.size(1)):
        scores = query[:, head].to(lse.dtype) @ key[:, head].to(lse.dtype).t() * scale
        yield torch.exp(scores - lse[:, head, None])


def _parts(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))
