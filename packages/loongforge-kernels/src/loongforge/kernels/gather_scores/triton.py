"""Scores of chosen keys and their gradients: one program per query, keys as the rows of every matrix product.

With keys (and in dq the width) as rows, a product fills Hopper's wgmma whatever the number of heads. q, dq and the
partial sums of dw stay on the chip; only dk leaves, by atomic additions: fp32, four at a time, or, deterministic, int64
in units of a power of two that no sum of the call's gradients can overflow.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_FORWARD = 128
"""Keys in one product."""
BLOCK_BACKWARD = 64
"""As many as registers allow: with 128 the fixed-point sums spill."""
FIXED_BITS = 61
"""Bits of a fixed-point sum's largest value; one more is the sign, one is spare."""


@triton.jit
def _used(index_ptr, K, S):
    """One past the last column that holds a key."""
    BLOCK: tl.constexpr = tl.constexpr(1024)
    last = tl.zeros((), tl.int32)
    for first in range(0, K, BLOCK):
        column = first + tl.arange(0, BLOCK)
        index = tl.load(index_ptr + column, mask=column < K, other=-1)
        last = tl.maximum(last, tl.max(tl.where((index >= 0) & (index < S), column + 1, 0), 0))
    return last


@triton.jit
def _load_query(q_ptr, w_ptr, t, H: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr):
    head, d = tl.arange(0, BH), tl.arange(0, BD)
    inside = (head < H)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + t * H * D + head[:, None] * D + d[None, :], mask=inside, other=0.0)  # [BH, BD]
    return q, tl.load(w_ptr + t * H + head, mask=head < H, other=0.0).to(tl.float32)


@triton.jit
def _load_keys(k_ptr, index_ptr, first, K, S, D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr):
    column, d = first + tl.arange(0, BK), tl.arange(0, BD)
    index = tl.load(index_ptr + column, mask=column < K, other=-1)
    valid = (index >= 0) & (index < S)
    row = tl.where(valid, index, 0).to(tl.int64)
    k = tl.load(k_ptr + row[:, None] * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
    return k, row, valid  # [BK, BD], [BK], [BK]


@triton.jit
def _forward(
    q_ptr, k_ptr, w_ptr, index_ptr, score_ptr, S, K,
    H: tl.constexpr, D: tl.constexpr, RELU: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    q, w = _load_query(q_ptr, w_ptr, t, H, D, BH, BD)
    index_ptr += t * K
    for first in range(0, K, BK):
        k, _, valid = _load_keys(k_ptr, index_ptr, first, K, S, D, BD, BK)
        product = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BK, BH]
        if RELU:
            product = tl.maximum(product, 0.0)
        score = tl.where(valid, tl.sum(product * w[None, :], 1), float("-inf"))
        column = first + tl.arange(0, BK)
        tl.store(score_ptr + t * K + column, score, mask=column < K)


@triton.jit
def _backward(
    grad_ptr, q_ptr, k_ptr, w_ptr, index_ptr, unit_ptr, dq_ptr, dk_ptr, dw_ptr, S, K,
    H: tl.constexpr, D: tl.constexpr, RELU: tl.constexpr, FIXED: tl.constexpr,
    BH: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    q, w = _load_query(q_ptr, w_ptr, t, H, D, BH, BD)
    index_ptr += t * K
    head, d = tl.arange(0, BH), tl.arange(0, BD)
    dq = tl.zeros((BD, BH), tl.float32)  # transposed, so that the width is its rows
    dw = tl.zeros((BH,), tl.float32)
    for first in range(0, _used(index_ptr, K, S), BK):
        k, row, valid = _load_keys(k_ptr, index_ptr, first, K, S, D, BD, BK)
        grad = tl.load(grad_ptr + t * K + first + tl.arange(0, BK), mask=valid, other=0.0).to(tl.float32)
        product = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BK, BH]
        slope = grad[:, None] * w[None, :]
        if RELU:
            slope = tl.where(product > 0.0, slope, 0.0)
            product = tl.maximum(product, 0.0)
        dw += tl.sum(product * grad[:, None], 0)
        slope = slope.to(k.dtype)
        dq = tl.dot(tl.trans(k), slope, dq, input_precision="ieee")
        dk = tl.dot(slope, q, input_precision="ieee")  # [BK, BD]
        inside = valid[:, None] & (d < D)[None, :]
        if FIXED:
            dk = (dk * tl.load(unit_ptr)).to(tl.int64)
        tl.atomic_add(dk_ptr + row[:, None] * D + d[None, :], dk, mask=inside, sem="relaxed")
    inside_q = (head < H)[None, :] & (d < D)[:, None]
    tl.store(dq_ptr + t * H * D + head[None, :] * D + d[:, None], dq.to(dq_ptr.dtype.element_ty), mask=inside_q)
    tl.store(dw_ptr + t * H + head, dw.to(dw_ptr.dtype.element_ty), mask=head < H)


def gather_scores(q: Tensor, k: Tensor, w: Tensor, indices: Tensor, relu: bool, deterministic: bool) -> Tensor:
    """scores `[T, K]` fp32 from q `[T, H, D]`, k `[S, D]`, w `[T, H]` and indices `[T, K]`; see the package."""
    queries, heads, width = q.shape
    scores = torch.empty(indices.shape, dtype=torch.float32, device=q.device)
    if scores.numel():
        launch: Any = _forward[(queries,)]
        launch(
            q.contiguous(), k.contiguous(), w.contiguous(), indices.contiguous(), scores, len(k), indices.shape[1],
            H=heads, D=width, RELU=relu, BK=BLOCK_FORWARD, **_blocks(heads, width), num_warps=8, num_stages=3,
        )  # fmt: skip
    return scores


def gather_scores_backward(
    grad: Tensor, q: Tensor, k: Tensor, w: Tensor, indices: Tensor, relu: bool, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and w, each in its dtype, from that of the scores `[T, K]`."""
    queries, heads, width = q.shape
    dq, dw = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, w))
    dk = torch.zeros(k.shape, dtype=torch.int64 if deterministic else torch.float32, device=k.device)
    unit = _unit(grad, q, w, indices, len(k)) if deterministic else None
    if queries:
        launch: Any = _backward[(queries,)]
        launch(
            grad.contiguous(), q.contiguous(), k.contiguous(), w.contiguous(), indices.contiguous(), unit, dq, dk, dw,
            len(k), indices.shape[1],
            H=heads, D=width, RELU=relu, FIXED=deterministic, BK=BLOCK_BACKWARD, **_blocks(heads, width),
            num_warps=8, num_stages=2,
        )  # fmt: skip
    if unit is not None:
        dk = dk.double() / unit
    return dq, dk.to(k.dtype), dw


def _blocks(heads: int, width: int) -> dict[str, int]:
    return {"BH": max(16, triton.next_power_of_2(heads)), "BD": max(16, triton.next_power_of_2(width))}


def _unit(grad: Tensor, q: Tensor, w: Tensor, indices: Tensor, keys: int) -> Tensor:
    """Fixed-point steps in 1, fp32 `[]`: a power of two with which no sum of dk passes `2 ** FIXED_BITS`.

    A key gets from query t at most `max|grad[t]| * sum|w[t]| * max|q|`, once.
    """
    valid = (indices >= 0) & (indices < keys)
    largest = torch.where(valid, grad.float().abs(), 0.0).amax(1)  # [T]
    bound = ((largest * w.float().abs().sum(1)).sum() * q.abs().amax().float()).clamp_min(torch.finfo().tiny)
    return torch.exp2((FIXED_BITS - torch.ceil(torch.log2(bound))).clamp_max(126))
