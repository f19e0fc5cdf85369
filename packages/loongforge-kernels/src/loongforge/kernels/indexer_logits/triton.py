"""Indexer logits as matrix products of keys with all heads of a few queries.

Keys are the rows and (query, head) pairs the columns of each product, so that the sum over heads stays within a few
threads, and the product fills Hopper's wgmma for any number of heads. A program holds its queries and walks over keys;
what lies outside of all its rows' bounds is filled and not computed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_KEYS = 128
"""Keys in one product."""
BLOCK_PAIRS = 128
"""(query, head) pairs in one product, unless a query has more heads."""
KEYS_EACH = 2048
"""Keys that one program walks over."""


@triton.jit
def _fill(out_ptr, t, start, end, T, S, BN: tl.constexpr):
    for first in range(start, end, BN):
        n = first + tl.arange(0, BN)
        inside = (n < S)[:, None] & (t < T)[None, :]
        empty = tl.full((BN, t.shape[0]), float("-inf"), tl.float32)
        tl.store(out_ptr + t.to(tl.int64)[None, :] * S + n[:, None], empty, mask=inside)


@triton.jit
def _logits(
    q_ptr, k_ptr, w_ptr, ks_ptr, ke_ptr, k_scale_ptr, out_ptr, T, S,
    H: tl.constexpr, D: tl.constexpr, RELU: tl.constexpr, SCALED: tl.constexpr,
    BQ: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1) * BQ + tl.arange(0, BQ)
    ks = tl.load(ks_ptr + t, mask=t < T, other=S)
    ke = tl.load(ke_ptr + t, mask=t < T, other=0)
    start = tl.program_id(0) * EACH
    end = tl.minimum(start + EACH, S)
    low = tl.minimum(tl.maximum(tl.min(ks, 0) // BN * BN, start), end)
    high = tl.maximum(tl.minimum(tl.max(ke, 0), end), low)
    high_block = low + tl.cdiv(high - low, BN) * BN
    _fill(out_ptr, t, start, low, T, S, BN)

    pair = tl.arange(0, BQ * BH)
    head = pair % BH
    row = tl.program_id(1) * BQ + pair // BH
    d = tl.arange(0, BD)
    real = (row < T) & (head < H)
    at = row.to(tl.int64) * H + head
    q = tl.load(q_ptr + at[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    w = tl.load(w_ptr + at, mask=real, other=0.0).to(tl.float32)  # [BQ * BH], as the rows of q
    for first in range(low, high, BN):
        n = first + tl.arange(0, BN)
        at_k = n.to(tl.int64)[:, None] * D + d[None, :]
        k = tl.load(k_ptr + at_k, mask=(n < S)[:, None] & (d < D)[None, :], other=0.0)  # [BN, BD]
        product = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BN, BQ * BH]
        if RELU:
            product = tl.maximum(product, 0.0)
        out = tl.sum(tl.reshape(product * w[None, :], (BN, BQ, BH)), 2)  # [BN, BQ]
        if SCALED:
            out *= tl.load(k_scale_ptr + n, mask=n < S, other=0.0)[:, None]
        seen = (n[:, None] >= ks[None, :]) & (n[:, None] < ke[None, :])
        inside = (n < S)[:, None] & (t < T)[None, :]
        at_out = t.to(tl.int64)[None, :] * S + n[:, None]
        tl.store(out_ptr + at_out, tl.where(seen, out, float("-inf")), mask=inside)
    _fill(out_ptr, t, high_block, end, T, S, BN)


def indexer_logits(
    q: Tensor, k: Tensor, w: Tensor, ks: Tensor, ke: Tensor, relu: bool, k_scale: Tensor | None
) -> Tensor:
    """logits `[T, S]` fp32 from q `[T, H, D]`, k `[S, D]` and w `[T, H]`; see the package."""
    queries, heads, width = q.shape
    keys = len(k)
    logits = torch.empty(queries, keys, dtype=torch.float32, device=q.device)
    if not queries or not keys:
        return logits
    q, k, w, ks, ke = (x.contiguous() for x in (q, k, w, ks, ke))
    head_block = triton.next_power_of_2(heads)
    query_block = max(1, BLOCK_PAIRS // head_block)
    launch: Any = _logits[(triton.cdiv(keys, KEYS_EACH), triton.cdiv(queries, query_block))]
    launch(
        q, k, w, ks, ke, k_scale, logits, queries, keys,
        H=heads, D=width, RELU=relu, SCALED=k_scale is not None,
        BQ=query_block, BH=head_block, BD=max(16, triton.next_power_of_2(width)), BN=BLOCK_KEYS, EACH=KEYS_EACH,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return logits
