"""The indexer's loss in Triton: one pass over a row for the divergence, one for the gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loongforge.kernels.tiles import adjacent

BLOCK = 2048
"""Most columns in one turn of a kernel's loop."""


@triton.jit
def _forward(
    scores_ptr, target_ptr, rows_ptr, lse_ptr, total_ptr, K, scores_row, target_row, BLOCK: tl.constexpr
):  # fmt: skip
    """With u the target and U its sum: `sum u (log u - x) / U - log U + logsumexp(x)`."""
    t = tl.program_id(0).to(tl.int64)
    top = tl.full([], float("-inf"), tl.float32)
    mass = tl.zeros([], tl.float32)
    total = tl.zeros([], tl.float32)
    gap = tl.zeros([], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(scores_ptr + t * scores_row + k, mask=k < K, other=float("-inf")).to(tl.float32)
        valid = x > float("-inf")
        u = tl.load(target_ptr + t * target_row + k, mask=valid & (k < K), other=0.0).to(tl.float32)
        top_new = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(top_new == float("-inf"), 0.0, top_new)
        mass = mass * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        total += tl.sum(u, 0)
        gap += tl.sum(u * (tl.log(tl.where(u > 0, u, 1.0)) - tl.where(valid, x, 0.0)), 0)
        top = top_new
    lse = tl.where(mass > 0, top + tl.log(tl.where(mass > 0, mass, 1.0)), float("-inf"))
    some = total > 0
    total_safe = tl.where(some, total, 1.0)
    tl.store(rows_ptr + t, tl.where(some, gap / total_safe - tl.log(total_safe) + lse, 0.0))
    tl.store(lse_ptr + t, lse)
    tl.store(total_ptr + t, total)


@triton.jit
def _backward(
    scores_ptr, target_ptr, lse_ptr, total_ptr, grad_ptr, dscores_ptr, K, scores_row, target_row, BLOCK: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(total_ptr + t)
    x = tl.load(scores_ptr + t * scores_row + k, mask=k < K, other=float("-inf")).to(tl.float32)
    valid = x > float("-inf")
    u = tl.load(target_ptr + t * target_row + k, mask=valid & (k < K), other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + t)
    softmax = tl.exp(x - tl.where(lse > float("-inf"), lse, 0.0))
    grad = tl.where(total > 0, tl.load(grad_ptr + t), 0.0)
    dscores = (softmax - u / tl.where(total > 0, total, 1.0)) * grad
    tl.store(dscores_ptr + t * K + k, tl.where(valid, dscores, 0.0).to(dscores_ptr.dtype.element_ty), mask=k < K)


def _shape(columns: int) -> tuple[int, int]:
    """Block size and warps for a row."""
    size = min(BLOCK, triton.next_power_of_2(columns))
    return size, max(1, size // 512)


def forward(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence, log-sum-exp and sum of the target of each row; see the package."""
    scores, target = adjacent(scores), adjacent(target)
    rows, lse, total = (torch.empty(len(scores), dtype=torch.float32, device=scores.device) for _ in range(3))
    if len(scores):
        size, warps = _shape(scores.shape[1])
        launch: Any = _forward[(len(scores),)]
        launch(
            scores, target, rows, lse, total, scores.shape[1], scores.stride(0), target.stride(0),
            BLOCK=size, num_warps=warps,
        )  # fmt: skip
    return rows, lse, total


def backward(scores: Tensor, target: Tensor, lse: Tensor, total: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the scores; see the package."""
    scores, target = adjacent(scores), adjacent(target)
    dscores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    if dscores.numel():
        size, warps = _shape(scores.shape[1])
        launch: Any = _backward[(len(scores), triton.cdiv(scores.shape[1], size))]
        launch(
            scores, target, lse, total, grad.contiguous(), dscores, scores.shape[1], scores.stride(0),
            target.stride(0), BLOCK=size, num_warps=warps,
        )  # fmt: skip
    return dscores
