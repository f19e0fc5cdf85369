"""`gather_scores(q, k, w, indices, *, relu=True, deterministic=False) -> scores`: index scores of chosen keys only.

`scores[t, c] = sum_j w[t, j] * relu(q[t, j] . k[indices[t, c]])`, as `indexer_logits` has them, for a selection that is
given: one that layers share, or that was made from coarser numbers. What is not in `[0, S)` is an empty column: -inf,
and its gradient is not read. q `[T, H, D]` and k `[S, D]` of one floating dtype, w `[T, H]` floating, indices int32
`[T, K]` without repetitions in a row; scores `[T, K]` fp32 (fp64 for fp64 q).

Differentiable in q, k and w; a row without keys has zero gradients. On a GPU the gradient of k is summed by atomic
additions, `deterministic` in fixed-point numbers of 64 bits, whose sum no order changes, about half as fast; q's and
w's gradients never depend on an order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loongforge.kernels.gather_scores import reference
from loongforge.kernels.indexer_logits.reference import wide
from loongforge.kernels.library import define

_TRITON = "loongforge.kernels.gather_scores.triton"


def _scores(q: Tensor, k: Tensor, w: Tensor, indices: Tensor, relu: bool, deterministic: bool) -> Tensor:
    return reference.gather_scores(q, k, w, indices, relu=relu)


def _fake(q: Tensor, k: Tensor, w: Tensor, indices: Tensor, relu: bool, deterministic: bool) -> Tensor:
    return q.new_empty(indices.shape, dtype=wide(q))


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, w: Tensor, indices: Tensor, relu: bool, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), w.new_empty(w.shape)


_op = define(_scores, name="gather_scores", cuda=f"{_TRITON}:gather_scores", fake=_fake)
_backward_op = define(
    reference.gather_scores_backward,
    name="gather_scores_backward",
    cuda=f"{_TRITON}:gather_scores_backward",
    fake=_backward_fake,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, w, indices, ctx.relu, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, w, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, w, indices = ctx.saved_tensors
    return *gradients(grad, q, k, w, indices, ctx.relu, ctx.deterministic), None, None, None


_op.register_autograd(_backward, setup_context=_keep)


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, w: Tensor, indices: Tensor, relu: bool, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and w from that of the scores `[T, K]`."""
    return _backward_op(grad, q, k, w, indices, relu, deterministic)


def gather_scores(
    q: Tensor, k: Tensor, w: Tensor, indices: Tensor, *, relu: bool = True, deterministic: bool = False
) -> Tensor:
    """scores `[T, K]` from q `[T, H, D]`, k `[S, D]`, w `[T, H]` and indices `[T, K]`; see the package."""
    return _op(q, k, w, indices, relu, deterministic)
