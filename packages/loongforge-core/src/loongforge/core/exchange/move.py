"""Move features along a route, and their gradients back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from loongforge.core.exchange.route import Route, shares
from loongforge.core.platform.sending import sent


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """One rank's part of a route: what it sends and what it receives."""

    group: dist.ProcessGroup
    """The domain."""
    block: dist.ProcessGroup
    """Ranks that make the same features."""
    rows: int
    """Features of this rank's block."""
    start: int
    """First of them that this rank hands out."""
    send: torch.Tensor
    """int64 `[sent]`: rows of the block's output, by receiver."""
    sent: list[int]
    """Rows to each rank of the domain."""
    received: list[int]
    """Rows from each."""
    order: torch.Tensor
    """int64 `[received]`: where in the received rows each row of the result is."""
    scenes: np.ndarray
    """int64 `[received]`: micro-batch of each row of the result."""
    hidden: np.ndarray
    """int64 `[received]`: its place in the hidden states."""

    @classmethod
    def of(cls, route: Route, group: dist.ProcessGroup, block: dist.ProcessGroup, device: torch.device) -> Carrier:
        """The part of this rank."""
        me, size = group.rank(), group.size()
        mine = route.arrival[route.target[route.arrival] == me]  # in the order of the result
        senders = route.source[mine]
        arrived = np.argsort(senders, kind="stable")  # received rows come sender by sender, each in the result's order
        order = np.empty_like(arrived)
        order[arrived] = np.arange(len(arrived))
        out = route.arrival[route.source[route.arrival] == me]  # by receiver, then in the receiver's order
        number = me // block.size()
        rows = route.block_rows[number]
        return cls(
            group=group,
            block=block,
            rows=rows,
            start=shares(rows, block.size())[block.rank()],
            send=sent(torch.from_numpy(route.offset[out]), device),
            sent=np.bincount(route.target[out], minlength=size).tolist(),
            received=np.bincount(senders, minlength=size).tolist(),
            order=sent(torch.from_numpy(order), device),
            scenes=route.scene[mine],
            hidden=route.hidden[mine],
        )


def move(features: torch.Tensor, carrier: Carrier) -> torch.Tensor:
    """`[rows, ...]` of this rank's block, equal on its ranks, to `[received, ...]`. Collective over the domain.

    The gradient that comes back is whole and equal on all ranks of the block.
    """
    return _Move.apply(features, carrier)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, carrier: Carrier) -> torch.Tensor:
        ctx.carrier = carrier
        sent = features[carrier.send]
        got = sent.new_empty((sum(carrier.received), *features.shape[1:]))
        dist.all_to_all_single(got, sent, carrier.received, carrier.sent, group=carrier.group)
        return got[carrier.order]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        carrier: Carrier = ctx.carrier
        (grad,) = grads
        got = torch.empty_like(grad)
        got[carrier.order] = grad
        sent = grad.new_empty((len(carrier.send), *grad.shape[1:]))
        dist.all_to_all_single(sent, got, carrier.sent, carrier.received, group=carrier.group)
        whole = grad.new_zeros((carrier.rows, *grad.shape[1:]))
        whole[carrier.send] = sent
        if carrier.block.size() > 1:
            whole = gather_shares(whole[carrier.start : carrier.start + len(carrier.send)], carrier.rows, carrier.block)
        return whole, None


def gather_shares(share: torch.Tensor, total: int, group: dist.ProcessGroup) -> torch.Tensor:
    """`[total, ...]` from the shares that neighbours hold, as `route.shares` deals them; without a graph."""
    if total == 0:
        return share.new_zeros((0, *share.shape[1:]))
    ends = shares(total, group.size())
    sizes = [ends[rank + 1] - ends[rank] for rank in range(group.size())]
    padded = share.new_zeros((max(sizes), *share.shape[1:]))
    padded[: len(share)] = share
    parts = share.new_empty((group.size() * max(sizes), *share.shape[1:]))
    dist.all_gather_into_tensor(parts, padded, group=group)
    pieces = parts.split(max(sizes))
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])


def gather(share: torch.Tensor, total: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All tensor parallel ranks' shares on each of them; a rank's gradient is its own share of the whole one."""
    return _Gather.apply(share, total, group) if group.size() > 1 else share


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: torch.Tensor, total: int, group: dist.ProcessGroup) -> torch.Tensor:
        start = shares(total, group.size())[group.rank()]
        ctx.mine = slice(start, start + len(share))
        return gather_shares(share, total, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0][ctx.mine].contiguous(), None, None
