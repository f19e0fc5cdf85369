"""Attention over gathered latent rows as it is written down, and its gradient: the truth, and the path of the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def gathered(rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[T, K, D]` of `rows` `[S, D]`, any row where the index is invalid, and which are valid `[T, K]`."""
    valid = (indices >= 0) & (indices < len(rows))
    at = indices.long().where(valid, 0)
    return rows.index_select(0, at.flatten()).view(*indices.shape, rows.shape[1]) if len(rows) else rows.new_zeros(
        *indices.shape, rows.shape[1]
    ), valid  # fmt: skip


def probabilities(q: Tensor, picked: Tensor, valid: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax `[T, H, K]` over the valid keys `picked` `[T, K, D]`, zeros without any, and log-sum-exp `[T, H]`."""
    scores = torch.einsum("thd,tkd->thk", q, picked) * scale
    some = valid.any(1)[:, None, None]
    scores = scores.masked_fill(~valid[:, None], float("-inf")).masked_fill(~some, 0.0)  # softmax of -inf alone is NaN
    lse = torch.logsumexp(scores, -1).masked_fill(~some[..., 0], float("-inf"))
    return torch.softmax(scores, -1).masked_fill(~valid[:, None], 0.0), lse


def sparse_mla(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, d_v]` and log-sum-exp `[T, H]`; see the package."""
    wide = torch.promote_types(q.dtype, torch.float32)
    picked, valid = gathered(kv.to(wide), indices)
    weights, lse = probabilities(q.to(wide), picked, valid, scale)
    out = torch.einsum("thk,tkd->thd", weights, picked[..., :d_v])
    if attn_sink is not None:
        out = out * torch.sigmoid(lse - attn_sink.to(wide))[..., None]
    return out.to(q.dtype).contiguous(), lse.contiguous()


def sparse_mla_backward(
    q: Tensor, kv: Tensor, indices: Tensor, attn_sink: Tensor | None, scale: float, deterministic: bool,
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, kv and the sink (empty without one) from those of output and log-sum-exp."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dout, delta, dsink = shared_terms(out.to(wide), lse, dout.to(wide), dlse, attn_sink)
    picked, valid = gathered(kv.to(wide), indices)
    weights, _ = probabilities(q.to(wide), picked, valid, scale)
    values = picked[..., : out.shape[2]]
    dscores = weights * (torch.einsum("thd,tkd->thk", dout, values) - delta[..., None]) * scale
    dq = torch.einsum("thk,tkd->thd", dscores, picked)
    dpicked = torch.einsum("thk,thd->tkd", dscores, q.to(wide))
    dpicked[..., : out.shape[2]] += torch.einsum("thk,thd->tkd", weights, dout)
    dkv = torch.zeros(kv.shape, dtype=wide, device=kv.device)
    dkv.index_add_(0, indices[valid].long(), dpicked[valid])
    return dq.to(q.dtype).contiguous(), dkv.to(kv.dtype), dsink


def shared_terms(
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, attn_sink: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the keys get of `dout`, the term `delta` `[T, H]` that every score's gradient subtracts, and the sink's own.

    The sink scales an output by g = sigmoid(lse - sink), the keys' share of the denominator: with p the softmax over
    the keys alone, a score's gradient is `p * (g * dout . value - g * dout . out + dlse)`, and keys see `g * dout`.
    """
    product = (out * dout).sum(-1)
    if attn_sink is None:
        return dout, product - dlse, dout.new_empty(0)
    share = torch.sigmoid(lse - attn_sink.to(lse.dtype))
    return dout * share[..., None], product * share - dlse, -((1 - share) * product).sum(0).to(attn_sink.dtype)
