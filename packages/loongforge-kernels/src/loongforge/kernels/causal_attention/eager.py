"""Causal attention over blocks of queries, as matrix products of just the keys each block may see.

On a CPU the products run at the speed of any other matrix product, and what the mask would throw away is not computed:
about half. All query heads that share a key head are one product. Short sequences keep their probabilities for the
backward pass, long ones compute them again, so that memory stays linear in the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KEEP_BYTES = 64 << 20
"""Most bytes of probabilities kept for the backward pass."""


class _Block(NamedTuple):
    """Queries `start` to `end`, of which the last sees keys 0 to `seen`."""

    start: int
    end: int
    seen: int


def _blocks(queries: int, keys: int) -> Iterator[_Block]:
    size = 64 if keys <= 1024 else 128
    for start in range(0, queries, size):
        end = min(start + size, queries)
        yield _Block(start, end, end + keys - queries)


def _rows(tensor: Tensor, block: _Block, groups: int) -> Tensor:
    """The block's rows of all heads of each group below one another: `[B, H, S, D]` to `[B * G, H / G * rows, D]`."""
    batch, _, _, width = tensor.shape
    return tensor[:, :, block.start : block.end].reshape(batch * groups, -1, width)


def _probabilities(query: Tensor, key: Tensor, block: _Block, scale: float) -> Tensor:
    """`[B * G, H / G * rows, seen]` from the block's queries and the keys it sees `[B * G, seen, D]`."""
    scores = torch.bmm(query, key.transpose(1, 2)).mul_(scale)
    rows = block.end - block.start
    future = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu_(1)
    scores.view(len(scores), -1, rows, block.seen)[..., -rows:].masked_fill_(future, float("-inf"))
    return torch.softmax(scores, dim=-1)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, keep_bytes: int) -> Tensor:
        batch, heads, length, width = query.shape
        groups, among = key.shape[1], key.shape[2]
        keep = batch * heads * length * (among - length // 2) * query.element_size() <= keep_bytes
        keys, values = (tensor.reshape(batch * groups, among, width) for tensor in (key, value))
        output = torch.empty_like(query)
        kept: list[Tensor] = []
        for block in _blocks(length, among):
            probabilities = _probabilities(_rows(query, block, groups), keys[:, : block.seen], block, scale)
            part = torch.bmm(probabilities, values[:, : block.seen])
            output[:, :, block.start : block.end] = part.view(batch, heads, -1, width)
            if keep and any(ctx.needs_input_grad):
                kept.append(probabilities)
        ctx.save_for_backward(query, keys, values, *kept)
        ctx.scale, ctx.shape = scale, key.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, *kept = ctx.saved_tensors
        groups = ctx.shape[1]
        dquery, dkeys, dvalues = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
        for number, block in enumerate(_blocks(query.shape[2], keys.shape[1])):
            seen_keys, seen_values = keys[:, : block.seen], values[:, : block.seen]
            rows, drows = _rows(query, block, groups), _rows(grad, block, groups)
            probabilities = kept[number] if kept else _probabilities(rows, seen_keys, block, ctx.scale)
            dvalues[:, : block.seen] += torch.bmm(probabilities.transpose(1, 2), drows)
            dprobabilities = torch.bmm(drows, seen_values.transpose(1, 2))
            dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, rows.dtype).mul_(ctx.scale)
            part = torch.bmm(dscores, seen_keys)
            dquery[:, :, block.start : block.end] = part.view(*query.shape[:2], -1, query.shape[3])
            dkeys[:, : block.seen] += torch.bmm(dscores.transpose(1, 2), rows)
        return dquery, dkeys.view(ctx.shape), dvalues.view(ctx.shape), None, None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, keep_bytes: int = KEEP_BYTES) -> Tensor:
    """output `[B, H, S, D]`; see the package. `keep_bytes` bounds what is kept for the backward pass."""
    return _CausalAttention.apply(query, key, value, scale, keep_bytes)
