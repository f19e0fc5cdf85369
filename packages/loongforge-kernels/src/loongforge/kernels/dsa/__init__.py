"""`dsa(q, kv, up, index, ks, ke, *, topk, scale, ...) -> Attended`: DeepSeek Sparse Attention by the fastest route.

The attention core of DeepSeek-V3.2 (equations 1 to 4) and GLM-5 over packed documents, from what the projections leave:
q `[T, H, N + R]` un-absorbed, the rotary part last; kv `[S, C + R]`, the normalized latent and the rotary key; up
`[H, N + V, C]`, the up-projection of keys and values (`kv_b_proj`'s weight, viewed); index, the indexer's queries
`[T, HI, DI]`, keys `[S, DI]` and weights `[T, HI]`; ks and ke int32 `[T]`, what `row_bounds` returns.

An indexer chooses at most `topk` keys for each query, attention sees those alone, and the indexer learns from what
attention gave them. Three routes have the same result (to rounding) and `plan` picks one by a table of speeds:
`causal` where no document is longer than top-k, `masked` and `gather`; `docs/kernels-dsa.md` explains them.

With `fp8` the indexer chooses by logits of rotated and rounded queries and keys, as DeepSeek-V3.2 does and
`lightning_indexer` explains. The choice alone is theirs: the scores that learn, and their gradients, are those of the
index as it was given, so the loss and the attention are what they would be with the same `indices`.

No gradient flows from attention into the indexer's inputs, nor from the loss into attention. Hand over an index made
from detached hidden states, or the loss reaches the layers below through it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from loongforge.kernels.attention_target import attention_target
from loongforge.kernels.dsa_costs import ESTIMATED as ESTIMATED
from loongforge.kernels.dsa_costs import Plan as Plan
from loongforge.kernels.dsa_costs import Route as Route
from loongforge.kernels.dsa_costs import Shape as Shape
from loongforge.kernels.dsa_costs import Speeds as Speeds
from loongforge.kernels.dsa_costs import plan as plan
from loongforge.kernels.gather_scores import gather_scores
from loongforge.kernels.indexer_kl import indexer_kl
from loongforge.kernels.lightning_indexer import lightning_indexer
from loongforge.kernels.masked_mha import masked_mha
from loongforge.kernels.selection_bits import selection_bits
from loongforge.kernels.sparse_mla import sparse_mla


class Attended(NamedTuple):
    """What attention gives."""

    out: Tensor
    """`[T, H, V]`, in q's dtype."""
    kl: Tensor | None
    """The indexer's loss as `indexer_kl` reduces it, None when it was not asked for."""
    indices: Tensor | None
    """The chosen keys, int32 `[T, topk]`, for layers that share them; None where every key in sight was taken."""


def dsa(
    q: Tensor, kv: Tensor, up: Tensor, index: tuple[Tensor, Tensor, Tensor] | None, ks: Tensor, ke: Tensor, *,
    topk: int, scale: float, indices: Tensor | None = None, route: Route | None = None, speeds: Speeds = ESTIMATED,
    longest: int | None = None, kl: str | None = "mean", row_weight: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None, deterministic: bool = False, fp8: bool = False,
) -> Attended:  # fmt: skip
    """Attention of q to the keys its indexer chose; the package says what the tensors are.

    `indices` are another layer's choice, instead of this indexer's. `route` overrides the plan, `speeds` its table;
    `longest` is the length of the longest document where the host knows it. `kl` is the reduction of the indexer's
    loss, None for no loss; it needs an index. `tp_group` holds the ranks with the other heads: the loss is about all
    of them. Raises ValueError when there is neither an index nor indices, a loss without an index, the route `causal`
    where top-k would leave keys out, or a choice by `fp8` of an index that is not 128 wide.
    """
    if index is None and (indices is None or kl is not None):
        raise ValueError("dsa without an index needs the indices of another layer and kl=None")
    shape = _shape(q, kv, up, topk, longest)
    route = plan(shape, speeds).route if route is None else route
    if route == "causal" and (shape.longest or shape.keys) > topk:
        raise ValueError(
            f"route='causal' is exact for documents of at most topk={topk} keys; say how long the longest is with "
            f"longest= (now {shape.longest or shape.keys}), or take 'masked' or 'gather'"
        )
    scores = None
    if route == "causal":
        indices = None if kl is None else _everything(ks, ke, topk)
    elif indices is None and index is not None:
        indices, scores, _ = lightning_indexer(*index, ks, ke, topk, fp8=fp8, deterministic=deterministic)
    if route == "gather" and indices is not None:
        out, lse = _gather(q, kv, up, indices, scale, deterministic)
    else:
        bits = None if route == "causal" or indices is None else selection_bits(indices, len(kv))
        out, lse = masked_mha(q, *_expand(kv, up, shape.nope), bits, ks, ke, scale)
    loss = None
    if kl is not None and index is not None and indices is not None:
        if scores is None:
            scores = gather_scores(*index, indices, deterministic=deterministic)
        with torch.no_grad():
            target = attention_target(absorb(q, up[:, : shape.nope]), kv, indices, lse, scale=scale)
            if tp_group is not None:
                dist.all_reduce(target, group=tp_group)
        loss = indexer_kl(scores, target, row_weight, kl)
    return Attended(out, loss, None if route == "causal" else indices)


def _shape(q: Tensor, kv: Tensor, up: Tensor, topk: int, longest: int | None) -> Shape:
    heads, columns, latent = up.shape
    rope = kv.shape[1] - latent
    nope = q.shape[2] - rope
    return Shape(
        queries=len(q), keys=len(kv), heads=heads, topk=topk, longest=longest, latent=latent, rope=rope, nope=nope,
        value=columns - nope,
    )  # fmt: skip


def _gather(
    q: Tensor, kv: Tensor, up: Tensor, indices: Tensor, scale: float, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, V]` and log-sum-exp through the latent."""
    latent = up.shape[2]
    nope = q.shape[2] - kv.shape[1] + latent
    absorbed = absorb(q, up[:, :nope])
    compressed, lse = sparse_mla(absorbed, kv, indices, scale=scale, d_v=latent, deterministic=deterministic)
    return torch.einsum("thc,hvc->thv", compressed, up[:, nope:]), lse


def _everything(ks: Tensor, ke: Tensor, topk: int) -> Tensor:
    """All the keys in sight as a selection `[T, topk]`: no row has more."""
    key = ks[:, None] + torch.arange(topk, dtype=torch.int32, device=ks.device)
    return key.where(key < ke[:, None], -1)


def absorb(q: Tensor, up: Tensor) -> Tensor:
    """Queries for the latent itself `[T, H, C + R]` from q `[T, H, N + R]` and the keys' up-projection `[H, N, C]`."""
    nope = up.shape[1]
    return torch.cat((torch.einsum("thn,hnc->thc", q[..., :nope], up), q[..., nope:]), -1)


def _expand(kv: Tensor, up: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """Keys `[S, H, N + R]` and values `[S, H, V]` of every head."""
    wide = torch.einsum("sc,hnc->shn", kv[:, : up.shape[2]], up)
    rope = kv[:, None, up.shape[2] :].expand(-1, len(up), -1)
    return torch.cat((wide[..., :nope], rope), -1), wide[..., nope:]
