"""Attention over gathered latent rows in Triton.

Forward: a program holds one query's block of heads and walks over the query's keys. With few heads (`swap`) keys take
the rows of every product, because Hopper's matrix instruction wants 64 of them. The backward is split, since one kernel
for all of it does not fit into a multiprocessor: a first kernel leaves the probabilities and the scores' gradients of a
chunk of queries in memory; a second makes from them, for some columns at a time and all heads in one product, a query's
gradient and its contributions to its keys. So each (query, key) pair adds to memory once, however many heads there are:
with atomics, or as rows that a third kernel sums in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loongforge.kernels.sparse_mla.reference import shared_terms
from loongforge.kernels.tiles import LN2, LOG2E, Tiles, adjacent, block, require_half, rows

CHUNK_BYTES = 1 << 30
"""About the most memory for what the kernels of the backward hand to each other."""
MAX_HEADS = 128


@triton.jit
def keys_of(indices, first, used, S, KEYS: tl.constexpr):
    """Rows of kv that the slots from `first` on name, int64, and which of them are keys."""
    slot = first + tl.arange(0, KEYS)
    index = tl.load(indices + slot, mask=slot < used, other=-1)
    valid = (index >= 0) & (index < S)
    return tl.where(valid, index, 0).to(tl.int64), valid


@triton.jit
def scores_of(q, q_rope, latent, rope, KEY_AXIS: tl.constexpr):
    """Products of heads and keys, which stand along KEY_AXIS: `[heads, keys]` where that is 1."""
    if KEY_AXIS == 0:
        scores = tl.dot(rope, tl.trans(q_rope), tl.dot(latent, tl.trans(q)))
    else:
        scores = tl.dot(q_rope, tl.trans(rope), tl.dot(q, tl.trans(latent)))
    return scores


@triton.jit
def _forward(
    q_ptr, kv_ptr, indices_ptr, used_ptr, sink_ptr, out_ptr, lse_ptr, scale_log2, S, H, blocks,
    q_row, q_head, kv_row, indices_row,
    D: tl.constexpr, C: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    KEY_AXIS: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """C is half of D: two loads of half a row need fewer registers for addresses than one."""
    t = (tl.program_id(0) // blocks).to(tl.int64)
    h = (tl.program_id(0) % blocks) * HEADS + tl.arange(0, HEADS)
    h_inside = h < H
    q = rows(q_ptr + t * q_row, h, h_inside, q_head, 0, C, C)
    q_more = rows(q_ptr + t * q_row, h, h_inside, q_head, C, C, C)
    q_rope = rows(q_ptr + t * q_row, h, h_inside, q_head, D, R, R)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    out = tl.zeros([C, HEADS] if KEY_AXIS == 0 else [HEADS, C], tl.float32)
    out_more = tl.zeros([C, HEADS] if KEY_AXIS == 0 else [HEADS, C], tl.float32)
    used = tl.load(used_ptr + t)
    for first in range(0, used, KEYS):
        row, valid = keys_of(indices_ptr + t * indices_row, first, used, S, KEYS)
        latent = rows(kv_ptr, row, valid, kv_row, 0, C, C)
        latent_more = rows(kv_ptr, row, valid, kv_row, C, C, C)
        rope = rows(kv_ptr, row, valid, kv_row, D, R, R)
        scores = scores_of(q, q_rope, latent, rope, KEY_AXIS)
        if KEY_AXIS == 0:
            scores = tl.dot(latent_more, tl.trans(q_more), scores)
        else:
            scores = tl.dot(q_more, tl.trans(latent_more), scores)
        scores = tl.where(tl.expand_dims(valid, 1 - KEY_AXIS), scores * scale_log2, float("-inf"))
        top_new = tl.maximum(top, tl.max(scores, KEY_AXIS))
        shift = tl.where(top_new == float("-inf"), 0.0, top_new)
        weights = tl.exp2(scores - tl.expand_dims(shift, KEY_AXIS))
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, KEY_AXIS)
        weights = weights.to(latent.dtype)
        out = out * tl.expand_dims(shrink, KEY_AXIS)
        out_more = out_more * tl.expand_dims(shrink, KEY_AXIS)
        if KEY_AXIS == 0:
            out = tl.dot(tl.trans(latent), weights, out)
            out_more = tl.dot(tl.trans(latent_more), weights, out_more)
        else:
            out = tl.dot(weights, latent, out)
            out_more = tl.dot(weights, latent_more, out_more)
        top = top_new
    some = total > 0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, (top + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse_ptr + t * H + h, lse, mask=h_inside)
    share = tl.where(some, 1.0 / total, 0.0)
    if HAS_SINK:
        sink = tl.load(sink_ptr + h, mask=h_inside, other=0.0).to(tl.float32)
        share = share * tl.sigmoid(lse - sink)
    share = tl.expand_dims(share, KEY_AXIS)
    column = tl.expand_dims(tl.arange(0, C), 1 - KEY_AXIS)
    at = out_ptr + tl.expand_dims(t * H + h, KEY_AXIS) * D + column
    kept = tl.expand_dims(h_inside, KEY_AXIS) & (column < C)
    tl.store(at, (out * share).to(out_ptr.dtype.element_ty), mask=kept)
    tl.store(at + C, (out_more * share).to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _backward_scores(
    q_ptr, kv_ptr, indices_ptr, used_ptr, dout_ptr, lse_ptr, delta_ptr, p_ptr, ds_ptr,
    scale, scale_log2, S, H, K, blocks, q_row, q_head, kv_row, indices_row,
    D: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    KEY_AXIS: tl.constexpr,
):  # fmt: skip
    """Probabilities and gradients of the scores, `[H, K]` each, of one query and a block of heads."""
    t = (tl.program_id(0) // blocks).to(tl.int64)
    h = (tl.program_id(0) % blocks) * HEADS + tl.arange(0, HEADS)
    h_inside = h < H
    q = rows(q_ptr + t * q_row, h, h_inside, q_head, 0, D, D)
    q_rope = rows(q_ptr + t * q_row, h, h_inside, q_head, D, R, R)
    dout = rows(dout_ptr + t * H * D, h, h_inside, D, 0, D, D)
    lse = tl.load(lse_ptr + t * H + h, mask=h_inside, other=float("inf"))
    lse = tl.expand_dims(tl.where(lse == float("-inf"), float("inf"), lse) / LN2, KEY_AXIS)
    delta = tl.expand_dims(tl.load(delta_ptr + t * H + h, mask=h_inside, other=0.0), KEY_AXIS)
    used = tl.load(used_ptr + t)
    for first in range(0, used, KEYS):
        row, valid = keys_of(indices_ptr + t * indices_row, first, used, S, KEYS)
        latent = rows(kv_ptr, row, valid, kv_row, 0, D, D)
        rope = rows(kv_ptr, row, valid, kv_row, D, R, R)
        scores = scores_of(q, q_rope, latent, rope, KEY_AXIS) * scale_log2
        p = tl.where(tl.expand_dims(valid, 1 - KEY_AXIS), tl.exp2(scores - lse), 0.0)
        dp = tl.dot(latent, tl.trans(dout)) if KEY_AXIS == 0 else tl.dot(dout, tl.trans(latent))
        ds = p * (dp - delta) * scale
        slot = tl.expand_dims(first + tl.arange(0, KEYS), 1 - KEY_AXIS)
        at = tl.expand_dims((t * H + h) * K, KEY_AXIS) + slot
        kept = tl.expand_dims(h_inside, KEY_AXIS) & (slot < used)
        tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=kept)
        tl.store(ds_ptr + at, ds.to(ds_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _backward_products(
    q_ptr, kv_ptr, dout_ptr, indices_ptr, used_ptr, p_ptr, ds_ptr, dq_ptr, to_ptr,
    S, H, K, q_row, q_head, kv_row, indices_row,
    D: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns, from FIRST on, of one query's gradient and of what it contributes to each of its keys."""
    t = (tl.program_id(0) // BLOCKS).to(tl.int64)
    first_column = FIRST + (tl.program_id(0) % BLOCKS) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    h = tl.arange(0, HEADS)
    h_inside = h < H
    q = rows(q_ptr + t * q_row + first_column, h, h_inside, q_head, 0, COLUMNS, COLUMNS)
    if FIRST < D:
        dout = rows(dout_ptr + t * H * D + first_column, h, h_inside, D, 0, COLUMNS, COLUMNS)
    dq = tl.zeros([HEADS, COLUMNS], tl.float32)
    used = tl.load(used_ptr + t)
    for first in range(0, used, KEYS):
        slot = first + tl.arange(0, KEYS)
        at = (t * H + h)[:, None] * K + slot[None, :]
        kept = h_inside[:, None] & (slot < used)[None, :]
        ds = tl.load(ds_ptr + at, mask=kept, other=0.0)
        row, valid = keys_of(indices_ptr + t * indices_row, first, used, S, KEYS)
        dq = tl.dot(ds, rows(kv_ptr + first_column, row, valid, kv_row, 0, COLUMNS, COLUMNS), dq)
        dkv = tl.dot(tl.trans(ds), q)
        if FIRST < D:
            dkv = tl.dot(tl.trans(tl.load(p_ptr + at, mask=kept, other=0.0)), dout, dkv)
        if ATOMIC:
            tl.atomic_add(to_ptr + row[:, None] * (D + R) + column[None, :], dkv, mask=valid[:, None], sem="relaxed")
        else:
            to = to_ptr + (t * K + slot)[:, None] * (D + R) + column[None, :]
            tl.store(to, dkv.to(to_ptr.dtype.element_ty), mask=valid[:, None])
    at = dq_ptr + (t * H + h)[:, None] * (D + R) + column[None, :]
    tl.store(at, dq.to(dq_ptr.dtype.element_ty), mask=h_inside[:, None])


@triton.jit
def _sum_pairs(
    parts_ptr, pairs_ptr, starts_ptr, out_ptr, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Add to a key's gradient the contributions of the pairs that chose it, in the order of the pairs."""
    s = tl.program_id(0).to(tl.int64)
    first = tl.load(starts_ptr + s)
    last = tl.load(starts_ptr + s + 1)
    total = tl.zeros([D], tl.float32)
    total_rope = tl.zeros([R], tl.float32)
    for start in range(first, last, ROWS):
        number = start + tl.arange(0, ROWS)
        inside = number < last
        pair = tl.load(pairs_ptr + number, mask=inside, other=0)
        total += tl.sum(rows(parts_ptr, pair, inside, D + R, 0, D, D).to(tl.float32), 0)
        total_rope += tl.sum(rows(parts_ptr, pair, inside, D + R, D, R, R).to(tl.float32), 0)
    if first < last:
        at = out_ptr + s * (D + R) + tl.arange(0, D)
        tl.store(at, tl.load(at) + total)
        at_rope = out_ptr + s * (D + R) + D + tl.arange(0, R)
        tl.store(at_rope, tl.load(at_rope) + total_rope)


def forward(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, d_v: int = 512, attn_sink: Tensor | None = None,
    deterministic: bool = False, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp; see the package."""
    q, kv, indices = adjacent(q), adjacent(kv), adjacent(indices)
    check(q, d_v)
    out = q.new_empty(*q.shape[:2], d_v)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    tiles = tiles or _tiles("forward", q.shape[1])
    blocks = triton.cdiv(q.shape[1], tiles.rows)
    if lse.numel():
        launch: Any = _forward[(len(q) * blocks,)]
        launch(
            q, kv, indices, used_slots(indices, len(kv)), attn_sink, out, lse, scale * LOG2E, len(kv), q.shape[1],
            blocks, *q.stride()[:2], kv.stride(0), indices.stride(0), D=d_v, C=d_v // 2, R=q.shape[2] - d_v,
            HEADS=tiles.rows, KEYS=tiles.keys, KEY_AXIS=0 if tiles.swap else 1, HAS_SINK=attn_sink is not None,
            num_stages=tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip
    return out, lse


def backward(
    q: Tensor, kv: Tensor, indices: Tensor, attn_sink: Tensor | None, scale: float, deterministic: bool,
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, scores_tiles: Tiles | None = None,
    products_tiles: Tiles | None = None, chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, kv and the sink; see the package."""
    q, kv, indices = adjacent(q), adjacent(kv), adjacent(indices)
    wide_dout, delta, dsink = shared_terms(out.float(), lse, dout.float(), dlse, attn_sink)
    dout = wide_dout.to(q.dtype).contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkv = torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
    queries, heads, slots = *q.shape[:2], indices.shape[1]
    pair_bytes = 2 * heads * q.element_size() + deterministic * q.shape[2] * q.element_size()
    chunk = max(1, min(queries, chunk_bytes // max(1, slots * pair_bytes)))
    used = used_slots(indices, len(kv))
    p, ds = (q.new_empty(chunk, heads, slots) for _ in range(2))
    for start in range(0, queries if dq.numel() else 0, chunk):
        part = slice(start, start + chunk)
        some = (q[part], dout[part], indices[part], used[part])
        _launch_scores(some, kv, lse[part], delta[part], p, ds, scale, scores_tiles or _tiles("scores", heads))
        _launch_products(some, kv, p, ds, dq[part], dkv, deterministic, products_tiles or _tiles("products", heads))
    return dq, dkv.to(kv.dtype), dsink


def _launch_scores(
    some: tuple[Tensor, ...], kv: Tensor, lse: Tensor, delta: Tensor, p: Tensor, ds: Tensor, scale: float, tiles: Tiles
) -> None:
    q, dout, indices, used = some
    blocks = triton.cdiv(q.shape[1], tiles.rows)
    launch: Any = _backward_scores[(len(q) * blocks,)]
    launch(
        q, kv, indices, used, dout, lse, delta, p, ds, scale, scale * LOG2E, len(kv), q.shape[1], indices.shape[1],
        blocks, *q.stride()[:2], kv.stride(0), indices.stride(0), D=dout.shape[2], R=q.shape[2] - dout.shape[2],
        HEADS=tiles.rows, KEYS=tiles.keys, KEY_AXIS=0 if tiles.swap else 1, num_stages=tiles.stages,
        num_warps=tiles.warps,
    )  # fmt: skip


def _launch_products(
    some: tuple[Tensor, ...], kv: Tensor, p: Tensor, ds: Tensor, dq: Tensor, dkv: Tensor, deterministic: bool,
    tiles: Tiles,
) -> None:  # fmt: skip
    q, dout, indices, used = some
    slots, width, d_v = indices.shape[1], q.shape[2], dout.shape[2]
    to = q.new_empty(len(q) * slots, width) if deterministic else dkv
    for first, columns in ((0, min(tiles.rows, d_v)), (d_v, width - d_v)):
        blocks = (d_v if first == 0 else width - d_v) // columns
        launch: Any = _backward_products[(len(q) * blocks,)]
        launch(
            q, kv, dout, indices, used, p, ds, dq, to, len(kv), q.shape[1], slots, *q.stride()[:2], kv.stride(0),
            indices.stride(0), D=d_v, R=width - d_v, FIRST=first, COLUMNS=columns, BLOCKS=blocks,
            HEADS=block(q.shape[1]), KEYS=tiles.keys, ATOMIC=not deterministic, num_stages=tiles.stages,
            num_warps=tiles.warps,
        )  # fmt: skip
    if deterministic and len(dkv):
        pairs, starts = pairs_by_key(indices, len(dkv))
        launch: Any = _sum_pairs[(len(dkv),)]
        launch(to, pairs, starts, dkv, D=d_v, R=width - d_v, ROWS=4)


def used_slots(indices: Tensor, keys: int) -> Tensor:
    """One past the last slot of each row that names a key, int32 `[T]`."""
    slot = torch.arange(1, indices.shape[1] + 1, dtype=torch.int32, device=indices.device)
    valid = (indices >= 0) & (indices < keys)
    return torch.nn.functional.pad(slot.where(valid, 0), (1, 0)).amax(1)


def pairs_by_key(indices: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Flat numbers `t * K + slot` of valid pairs, by key and ascending, and where each key's begin `[keys + 1]`."""
    flat = indices.flatten()
    key, pairs = flat.where((flat >= 0) & (flat < keys), keys).sort(stable=True)
    return pairs, torch.searchsorted(key, torch.arange(keys + 1, dtype=key.dtype, device=key.device))


def check(q: Tensor, d_v: int) -> None:
    """Raise where the kernels cannot help."""
    require_half("sparse_mla", q)
    rope, heads = q.shape[2] - d_v, q.shape[1]
    powers = all(width >= least and width & (width - 1) == 0 for width, least in ((d_v, 32), (rope, 16)))
    if not powers or heads > MAX_HEADS:
        raise ValueError(
            f"sparse_mla on a GPU takes at most {MAX_HEADS} heads, d_v a power of two from 32 on and q.shape[2] - d_v "
            f"one from 16 on, not {heads} heads, {d_v} and {rope}; `loongforge.kernels.sparse_mla.reference` takes any"
        )


def _tiles(kernel: str, heads: int) -> Tiles:
    """Cuts that fit into an H200 by the ahead-of-time gate of the tests; not measured for speed yet."""
    if kernel == "products":
        return Tiles(rows=128, keys=64)  # rows are columns here: all heads are in one product
    return Tiles(rows=block(heads), keys=64, swap=True) if heads <= 16 else Tiles(rows=64, keys=32)
