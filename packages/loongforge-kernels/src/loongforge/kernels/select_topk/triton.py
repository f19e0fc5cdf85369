"""Exact top-k of a row by radix: four passes find the k-th largest logit bit by bit, a fifth writes in key order.

Logits become unsigned integers of the same order. Each pass counts the values of the next 8 bits among the logits that
agree with the bits found so far, and so fixes 8 more. One program per row and no atomics: the result does not depend on
the order of anything. Rows that fit into the selection skip the search.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Logits that a program reads at a time."""


@triton.jit
def _ordered(x):
    """fp32 as uint32 of the same order; -0 as +0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000).to(tl.uint32)


@triton.jit
def _load(x_ptr, key, S):
    """Not masked by the row's bounds, which nothing aligns: so four logits are one load."""
    return tl.load(x_ptr + key, mask=key < S, other=0.0)


@triton.jit
def _select(x_ptr, ks_ptr, ke_ptr, index_ptr, score_ptr, length_ptr, S, K, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    ks = tl.maximum(tl.load(ks_ptr + t), 0)
    ke = tl.minimum(tl.load(ke_ptr + t), S)
    length = tl.minimum(tl.maximum(ke - ks, 0), K)
    start = ks // BLOCK * BLOCK
    x_ptr += t * S
    least = tl.zeros((), tl.uint32)  # the length-th largest; below every number when all are taken
    wanted = length  # how many that equal it are taken
    if ke - ks > K:
        bins = tl.arange(0, 256)
        found = tl.zeros((), tl.uint32)  # a one for each bit of `least` that is known
        for step in range(4):
            counts = tl.zeros((256,), tl.int32)
            for first in range(start, ke, BLOCK):
                key = first + tl.arange(0, BLOCK)
                bits = _ordered(_load(x_ptr, key, S))
                agree = (key >= ks) & (key < ke) & (((bits ^ least) & found) == 0)
                counts += tl.histogram(((bits >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=agree)
            above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # in larger bins
            here = (above < wanted) & (above + counts >= wanted)
            least = least | (tl.sum(tl.where(here, bins, 0), 0).to(tl.uint32) << (24 - 8 * step))
            found = found | (tl.full((), 255, tl.uint32) << (24 - 8 * step))
            wanted -= tl.sum(tl.where(here, above, 0), 0)
    larger_before = tl.zeros((), tl.int32)
    equal_before = tl.zeros((), tl.int32)
    for first in range(start, ke, BLOCK):
        key = first + tl.arange(0, BLOCK)
        inside = (key >= ks) & (key < ke)
        x = _load(x_ptr, key, S)
        bits = _ordered(x)
        larger = inside & (bits > least)
        equal = inside & (bits == least)
        larger_rank = larger_before + tl.cumsum(larger.to(tl.int32), 0) - larger.to(tl.int32)
        equal_rank = equal_before + tl.cumsum(equal.to(tl.int32), 0) - equal.to(tl.int32)
        taken = larger | (equal & (equal_rank < wanted))
        column = larger_rank + tl.minimum(equal_rank, wanted)
        tl.store(index_ptr + t * K + column, key.to(tl.int32), mask=taken)
        tl.store(score_ptr + t * K + column, x, mask=taken)
        larger_before += tl.sum(larger.to(tl.int32), 0)
        equal_before += tl.sum(equal.to(tl.int32), 0)
    for first in range(length // BLOCK * BLOCK, K, BLOCK):
        column = first + tl.arange(0, BLOCK)
        empty = (column >= length) & (column < K)
        tl.store(index_ptr + t * K + column, tl.full((BLOCK,), -1, tl.int32), mask=empty)
        tl.store(score_ptr + t * K + column, tl.full((BLOCK,), float("-inf"), tl.float32), mask=empty)
    tl.store(length_ptr + t, length)


def select_topk(logits: Tensor, ks: Tensor, ke: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """indices, scores and length from fp32 logits `[T, S]`; see the package."""
    rows, keys = logits.shape
    indices = torch.empty(rows, topk, dtype=torch.int32, device=logits.device)
    scores = torch.empty(rows, topk, dtype=torch.float32, device=logits.device)
    length = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows:
        launch: Any = _select[(rows,)]
        launch(
            logits.contiguous(), ks.contiguous(), ke.contiguous(), indices, scores, length, keys, topk,
            BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return indices, scores, length
