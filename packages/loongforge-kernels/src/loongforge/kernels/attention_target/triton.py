"""What attention gives to each chosen key, in Triton: keys stay, heads pass by."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loongforge.kernels.sparse_mla.triton import keys_of, scores_of
from loongforge.kernels.tiles import LN2, LOG2E, Tiles, adjacent, block, require_half, rows


@triton.jit
def _target(
    q_ptr, kv_ptr, indices_ptr, lse_ptr, target_ptr, scale_log2, S, H, K, blocks, q_row, q_head, kv_row, indices_row,
    D: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, KEY_AXIS: tl.constexpr,
    ):  # fmt: skip
    t = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * KEYS
    row, valid = keys_of(indices_ptr + t * indices_row, first, K, S, KEYS)
    latent = rows(kv_ptr, row, valid, kv_row, 0, D, D)
    rope = rows(kv_ptr, row, valid, kv_row, D, R, R)
    total = tl.zeros([KEYS], tl.float32)
    heads = H * tl.max(valid.to(tl.int32), 0)  # none to look at where no slot is a key
    for head in range(0, heads, HEADS):
        h = head + tl.arange(0, HEADS)
        h_inside = h < H
        q = rows(q_ptr + t * q_row, h, h_inside, q_head, 0, D, D)
        q_rope = rows(q_ptr + t * q_row, h, h_inside, q_head, D, R, R)
        lse = tl.load(lse_ptr + t * H + h, mask=h_inside, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse) / LN2
        scores = scores_of(q, q_rope, latent, rope, KEY_AXIS) * scale_log2
        total += tl.sum(tl.exp2(scores - tl.expand_dims(lse, KEY_AXIS)), 1 - KEY_AXIS)
    slot = first + tl.arange(0, KEYS)
    tl.store(target_ptr + t * K + slot, tl.where(valid, total, 0.0), mask=slot < K)


def attention_target(
    q: Tensor, kv: Tensor, indices: Tensor, lse: Tensor, scale: float, tiles: Tiles | None = None
) -> Tensor:
    """Sums of probabilities `[T, K]`; see the package."""
    require_half("attention_target", q)
    q, kv, indices, lse = adjacent(q), adjacent(kv), adjacent(indices), lse.contiguous()
    heads, width = q.shape[1:]
    target = q.new_empty(indices.shape, dtype=torch.float32)
    tiles = tiles or _tiles(heads)
    blocks = triton.cdiv(indices.shape[1], tiles.keys)
    latent = 1 << ((width - 1).bit_length() - 1)  # 512 of 576: what is left is the rotary part
    if target.numel():
        launch: Any = _target[(len(q) * blocks,)]
        launch(
            q, kv, indices, lse, target, scale * LOG2E, len(kv), heads, indices.shape[1], blocks, *q.stride()[:2],
            kv.stride(0), indices.stride(0), D=latent, R=width - latent, HEADS=tiles.rows, KEYS=tiles.keys,
            KEY_AXIS=0 if tiles.swap else 1, num_stages=tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip
    return target


def _tiles(heads: int) -> Tiles:
    """Cuts that fit into an H200 by the ahead-of-time gate of the tests; not measured for speed yet."""
    if heads <= 16:
        return Tiles(rows=block(heads), keys=64, warps=4, stages=1, swap=True)
    return Tiles(rows=64, keys=64, swap=True)
