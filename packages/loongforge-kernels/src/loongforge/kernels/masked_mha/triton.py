"""Attention under a bit mask in Triton: one kernel for the output, one for dQ, one for dK and dV; no atomics.

Legend: T queries, S keys; M a block of queries, N a block of keys. The width of q and k need not be a power of two, as
Triton's tiles must be: it is split into `A` columns, a power of two, and the `B` that are left (128 + 64).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loongforge.kernels.tiles import LN2, LOG2E, Tiles, adjacent, block, put, require_half, rows


@triton.jit
def _seen(bits_ptr, words, m, m_inside, ks, ke, n, S, HAS_BITS: tl.constexpr):
    """Which keys n the queries m see, `[M, N]` from m and bounds `[M, 1]` and n `[1, N]`, or all of it transposed."""
    seen = (n >= ks) & (n < ke)
    if HAS_BITS:
        word = tl.load(bits_ptr + m.to(tl.int64) * words + (n >> 5), mask=m_inside & (n < S), other=0)
        seen = seen & (((word >> (n & 31)) & 1) != 0)
    return seen


@triton.jit
def _bounds(ks_ptr, ke_ptr, m, m_inside) -> Any:
    """Range of each query, empty as `[0, 0)`, and the range that holds them all."""
    ks = tl.load(ks_ptr + m, mask=m_inside, other=0)
    ke = tl.load(ke_ptr + m, mask=m_inside, other=0)
    high = tl.max(tl.where(ks < ke, ke, 0), 0)
    low = tl.min(tl.where(ks < ke, ks, high), 0)
    return ks, ke, low, high


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, bits_ptr, ks_ptr, ke_ptr, out_ptr, lse_ptr, scale_log2, T, S, H, words,
    q_row, q_head, k_row, k_head, v_row, v_head,
    A: tl.constexpr, B: tl.constexpr, B_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, HAS_BITS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1).to(tl.int64)
    m_inside = m < T
    q_base, k_base, v_base = q_ptr + head * q_head, k_ptr + head * k_head, v_ptr + head * v_head
    q = rows(q_base, m, m_inside, q_row, 0, A, A)
    if B > 0:
        q_rest = rows(q_base, m, m_inside, q_row, A, B, B_BLOCK)
    ks, ke, low, high = _bounds(ks_ptr, ke_ptr, m, m_inside)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, V_BLOCK], tl.float32)
    for start in range(low // N * N, high, N):
        n = start + tl.arange(0, N)
        n_inside = n < S
        scores = tl.dot(q, tl.trans(rows(k_base, n, n_inside, k_row, 0, A, A)))
        if B > 0:
            scores = tl.dot(q_rest, tl.trans(rows(k_base, n, n_inside, k_row, A, B, B_BLOCK)), scores)
        v = rows(v_base, n, n_inside, v_row, 0, V, V_BLOCK)
        seen = _seen(
            bits_ptr, words, m[:, None], m_inside[:, None], ks[:, None], ke[:, None], n[None, :], S, HAS_BITS
        )  # fmt: skip
        scores = tl.where(seen, scores * scale_log2, float("-inf"))
        top_new = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(top_new == float("-inf"), 0.0, top_new)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None])
        top = top_new
    some = total > 0
    total = tl.where(some, total, 1.0)
    column = tl.arange(0, V_BLOCK)
    at = (m.to(tl.int64) * H + head)[:, None] * V + column[None, :]
    out = tl.where(some[:, None], out / total[:, None], 0.0)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=m_inside[:, None] & (column < V)[None, :])
    lse = tl.where(some, (top + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse_ptr + m.to(tl.int64) * H + head, lse, mask=m_inside)


@triton.jit
def _row_sums(lse_ptr, delta_ptr, m, m_inside, head, H):
    """Log-sum-exp to base 2, infinite where there are no keys so that probabilities become 0, and delta."""
    at = m.to(tl.int64) * H + head
    lse = tl.load(lse_ptr + at, mask=m_inside, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse) / LN2
    return lse, tl.load(delta_ptr + at, mask=m_inside, other=0.0)


@triton.jit
def _backward_q(
    q_ptr, k_ptr, v_ptr, bits_ptr, ks_ptr, ke_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    scale, scale_log2, T, S, H, words, q_row, q_head, k_row, k_head, v_row, v_head,
    A: tl.constexpr, B: tl.constexpr, B_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, HAS_BITS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1).to(tl.int64)
    m_inside = m < T
    q_base, k_base, v_base = q_ptr + head * q_head, k_ptr + head * k_head, v_ptr + head * v_head
    q = rows(q_base, m, m_inside, q_row, 0, A, A)
    dq = tl.zeros([M, A], tl.float32)
    if B > 0:
        q_rest = rows(q_base, m, m_inside, q_row, A, B, B_BLOCK)
        dq_rest = tl.zeros([M, B_BLOCK], tl.float32)
    dout = rows(dout_ptr + head * V, m, m_inside, H * V, 0, V, V_BLOCK)
    lse, delta = _row_sums(lse_ptr, delta_ptr, m, m_inside, head, H)
    ks, ke, low, high = _bounds(ks_ptr, ke_ptr, m, m_inside)
    for start in range(low // N * N, high, N):
        n = start + tl.arange(0, N)
        n_inside = n < S
        k = rows(k_base, n, n_inside, k_row, 0, A, A)
        scores = tl.dot(q, tl.trans(k))
        if B > 0:
            k_rest = rows(k_base, n, n_inside, k_row, A, B, B_BLOCK)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores)
        v = rows(v_base, n, n_inside, v_row, 0, V, V_BLOCK)
        seen = _seen(
            bits_ptr, words, m[:, None], m_inside[:, None], ks[:, None], ke[:, None], n[None, :], S, HAS_BITS
        )  # fmt: skip
        p = tl.where(seen, tl.exp2(scores * scale_log2 - lse[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v))
        ds = (p * (dp - delta[:, None]) * scale).to(k.dtype)
        dq = tl.dot(ds, k, dq)
        if B > 0:
            dq_rest = tl.dot(ds, k_rest, dq_rest)
    dq_base = dq_ptr + head * (A + B)
    put(dq_base, m, m_inside, H * (A + B), dq, 0, A, A)
    if B > 0:
        put(dq_base, m, m_inside, H * (A + B), dq_rest, A, B, B_BLOCK)


@triton.jit
def _backward_kv(
    q_ptr, k_ptr, v_ptr, bits_ptr, ks_ptr, ke_ptr, first_ptr, last_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    scale, scale_log2, T, S, H, words, q_row, q_head, k_row, k_head, v_row, v_head,
    A: tl.constexpr, B: tl.constexpr, B_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, HAS_BITS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * N + tl.arange(0, N)
    head = tl.program_id(1).to(tl.int64)
    n_inside = n < S
    q_base, k_base, v_base = q_ptr + head * q_head, k_ptr + head * k_head, v_ptr + head * v_head
    k = rows(k_base, n, n_inside, k_row, 0, A, A)
    dk = tl.zeros([N, A], tl.float32)
    if B > 0:
        k_rest = rows(k_base, n, n_inside, k_row, A, B, B_BLOCK)
        dk_rest = tl.zeros([N, B_BLOCK], tl.float32)
    v = rows(v_base, n, n_inside, v_row, 0, V, V_BLOCK)
    dv = tl.zeros([N, V_BLOCK], tl.float32)
    first = tl.load(first_ptr + tl.program_id(0))
    last = tl.load(last_ptr + tl.program_id(0))
    for number in range(first, last):
        m = number * M + tl.arange(0, M)
        m_inside = m < T
        q = rows(q_base, m, m_inside, q_row, 0, A, A)
        scores = tl.dot(k, tl.trans(q))
        if B > 0:
            q_rest = rows(q_base, m, m_inside, q_row, A, B, B_BLOCK)
            scores = tl.dot(k_rest, tl.trans(q_rest), scores)
        dout = rows(dout_ptr + head * V, m, m_inside, H * V, 0, V, V_BLOCK)
        lse, delta = _row_sums(lse_ptr, delta_ptr, m, m_inside, head, H)
        ks = tl.load(ks_ptr + m, mask=m_inside, other=0)
        ke = tl.load(ke_ptr + m, mask=m_inside, other=0)
        seen = _seen(
            bits_ptr, words, m[None, :], m_inside[None, :], ks[None, :], ke[None, :], n[:, None], S, HAS_BITS
        )  # fmt: skip
        p = tl.where(seen, tl.exp2(scores * scale_log2 - lse[None, :]), 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv)
        dp = tl.dot(v, tl.trans(dout))
        ds = (p * (dp - delta[None, :]) * scale).to(q.dtype)
        dk = tl.dot(ds, q, dk)
        if B > 0:
            dk_rest = tl.dot(ds, q_rest, dk_rest)
    dk_base = dk_ptr + head * (A + B)
    put(dk_base, n, n_inside, H * (A + B), dk, 0, A, A)
    if B > 0:
        put(dk_base, n, n_inside, H * (A + B), dk_rest, A, B, B_BLOCK)
    put(dv_ptr + head * V, n, n_inside, H * V, dv, 0, V, V_BLOCK)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor | None, ks: Tensor, ke: Tensor, scale: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp; see the package."""
    require_half("masked_mha", q)
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    tiles = tiles or _tiles("forward", q.shape[2], v.shape[2])
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    if out.numel():
        launch: Any = _forward[(triton.cdiv(len(q), tiles.rows), q.shape[1])]
        launch(q, k, v, bits, ks, ke, out, lse, scale * LOG2E, *_sizes(q, k, v, bits), **_constants(q, v, bits, tiles))
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor | None, ks: Tensor, ke: Tensor, scale: float,
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, q_tiles: Tiles | None = None, kv_tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; see the package."""
    q, k, v, dout = adjacent(q), adjacent(k), adjacent(v), dout.contiguous()
    delta = (out.float() * dout.float()).sum(-1).sub_(dlse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    heads, numbers = q.shape[1], (scale, scale * LOG2E, *_sizes(q, k, v, bits))
    if dq.numel():
        tiles = q_tiles or _tiles("backward_q", q.shape[2], v.shape[2])
        launch: Any = _backward_q[(triton.cdiv(len(q), tiles.rows), heads)]
        launch(q, k, v, bits, ks, ke, dout, lse, delta, dq, *numbers, **_constants(q, v, bits, tiles))
    if dk.numel():
        tiles = kv_tiles or _tiles("backward_kv", q.shape[2], v.shape[2])
        first, last = query_blocks(ks, ke, len(k), tiles)
        launch: Any = _backward_kv[(triton.cdiv(len(k), tiles.keys), heads)]
        launch(q, k, v, bits, ks, ke, first, last, dout, lse, delta, dk, dv, *numbers, **_constants(q, v, bits, tiles))
    return dq, dk, dv


def query_blocks(ks: Tensor, ke: Tensor, keys: int, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """For each block of keys, the first block of queries that sees any of it and one past the last, int32."""
    blocks = triton.cdiv(len(ks), tiles.rows)
    missing = blocks * tiles.rows - len(ks)
    seen = ks < ke
    low = torch.nn.functional.pad(ks.where(seen, keys), (0, missing), value=keys).view(blocks, -1).amin(1)
    high = torch.nn.functional.pad(ke.where(seen, 0), (0, missing), value=0).view(blocks, -1).amax(1)
    start = torch.arange(0, keys, tiles.keys, device=ks.device)[:, None]
    meets = (low < start + tiles.keys) & (high > start)  # [key blocks, query blocks]
    number = torch.arange(blocks, device=ks.device)
    first = number.where(meets, blocks).amin(1)
    last = (number + 1).where(meets, 0).amax(1)
    return first.int(), last.int()


def _tiles(kernel: str, width: int, v_width: int) -> Tiles:
    """Cuts that fit into an H200 by the ahead-of-time gate of the tests; not measured for speed yet."""
    wide = max(width, v_width) > 192
    if kernel == "forward":
        return Tiles(rows=64 if wide else 128, keys=64)
    if kernel == "backward_q":
        return Tiles(rows=64, keys=32 if wide else 64)
    return Tiles(rows=16 if wide else 64, keys=64)  # two sums of 64 keys by 256 columns leave few registers


def _sizes(q: Tensor, k: Tensor, v: Tensor, bits: Tensor | None) -> tuple[int, ...]:
    words = 0 if bits is None else bits.stride(0)
    return len(q), len(k), q.shape[1], words, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]


def _constants(q: Tensor, v: Tensor, bits: Tensor | None, tiles: Tiles) -> dict[str, Any]:
    width, v_width = q.shape[2], v.shape[2]
    most = 1 << (width.bit_length() - 1)
    rest = width - most
    return {
        "A": most, "B": rest, "B_BLOCK": block(rest),
        "V": v_width, "V_BLOCK": block(v_width),
        "M": tiles.rows, "N": tiles.keys, "HAS_BITS": bits is not None, "num_stages": tiles.stages,
        "num_warps": tiles.warps,
    }  # fmt: skip
