"""`lightning_indexer(q, k, w, ks, ke, topk, ...) -> Selection`: the keys each query attends to, with their scores.

`select_topk` of `indexer_logits`, equations 1 and 2 of DeepSeek-V3.2, whose scores are differentiable in q, k and w
with the selection held fixed: q `[T, H, D]` and k `[S, D]` of one floating dtype, w `[T, H]` floating, ks and ke int32
`[T]` within `[0, S]`; indices int32, scores fp32 (fp64 for fp64 q), both `[T, topk]`, and length int32 `[T]`. Queries
are taken `chunk_rows` at a time, so that only `[chunk_rows, S]` logits exist; by default as many as take 1 GiB. A row
without keys has an empty selection and zero gradients. The backward pass is that of `gather_scores`, on the chosen keys
only; `deterministic` is explained there.

With `fp8`, for D = 128, keys are chosen as DeepSeek-V3.2 does it: by the logits of q and k that `hadamard_quant`
rotated and rounded to float8_e4m3fn, q's scales folded into w, a scale for each key. The scores are those of q, k and w
as they were given, recomputed for the chosen keys, and so are the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loongforge.kernels.fp8.blocks import hadamard_quant
from loongforge.kernels.gather_scores import gather_scores, gradients
from loongforge.kernels.indexer_logits.reference import wide
from loongforge.kernels.library import define
from loongforge.kernels.lightning_indexer import reference
from loongforge.kernels.lightning_indexer.reference import chunk_of, quantised
from loongforge.kernels.select_topk import Selection as Selection


def _select(
    q: Tensor, k: Tensor, w: Tensor, ks: Tensor, ke: Tensor, topk: int, relu: bool, chunk: int, deterministic: bool,
    k_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    indices, scores, length = reference.select(q, k, w, ks, ke, topk, relu, chunk, k_scale)
    return scores, indices, length  # the differentiable one first: torch's opcheck adds up outputs in place


def _fake(q: Tensor, k: Tensor, w: Tensor, ks: Tensor, ke: Tensor, topk: int, *rest: Any) -> tuple[Tensor, ...]:
    scores = q.new_empty(q.shape[0], topk, dtype=wide(q))
    return scores, torch.empty_like(scores, dtype=torch.int32), scores.new_empty(q.shape[0], dtype=torch.int32)


_op = define(
    _select,
    name="lightning_indexer",
    cuda="loongforge.kernels.lightning_indexer.triton:lightning_indexer",
    fake=_fake,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, w, *_, ctx.relu, _, ctx.deterministic, _ = inputs
    _, indices, length = output
    ctx.save_for_backward(q, k, w, indices)
    ctx.mark_non_differentiable(indices, length)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, w, indices = ctx.saved_tensors
    return *gradients(grad, q, k, w, indices, ctx.relu, ctx.deterministic), *(None,) * 7


_op.register_autograd(_backward, setup_context=_keep)


def lightning_indexer(
    q: Tensor, k: Tensor, w: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    relu: bool = True, fp8: bool = False, chunk_rows: int | None = None, deterministic: bool = False,
) -> Selection:  # fmt: skip
    """The selection of topk keys for each row of q `[T, H, D]` from k `[S, D]`; see the package."""
    chunk = chunk_of(len(q), len(k), chunk_rows)
    if not fp8:
        scores, indices, length = _op(q, k, w, ks, ke, topk, relu, chunk, deterministic, None)
        return Selection(indices, scores, length)
    with torch.no_grad():
        *operands, k_scale = quantised(q, k, w, hadamard_quant)
        _, indices, length = _op(*operands, ks, ke, topk, relu, chunk, deterministic, k_scale)
    return Selection(indices, gather_scores(q, k, w, indices, relu=relu, deterministic=deterministic), length)
