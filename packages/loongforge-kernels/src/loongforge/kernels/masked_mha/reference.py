"""Attention under a bit mask as it is written down, and its gradient: the truth, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(bits: Tensor | None, ks: Tensor, ke: Tensor, keys: int) -> Tensor:
    """Which key each query sees, bool `[T, keys]`: within `[ks, ke)` and, where there are bits, with its bit set."""
    key = torch.arange(keys, device=ks.device)
    seen = (key >= ks[:, None]) & (key < ke[:, None])
    if bits is None:
        return seen
    return seen & ((bits.index_select(1, key // 32) >> (key % 32)) & 1).bool()


def masked_mha(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor | None, ks: Tensor, ke: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, DV]` and log-sum-exp `[T, H]`; see the package."""
    probabilities, lse = _softmax(q, k, visible(bits, ks, ke, len(k)), scale)
    out = torch.einsum("hts,shd->thd", probabilities, v.to(lse.dtype))
    return out.to(q.dtype).contiguous(), lse


def masked_mha_backward(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor | None, ks: Tensor, ke: Tensor, scale: float,
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from those of output and log-sum-exp."""
    probabilities, _ = _softmax(q, k, visible(bits, ks, ke, len(k)), scale)
    wide = probabilities.dtype
    dout = dout.to(wide)
    delta = (out.to(wide) * dout).sum(-1) - dlse  # [T, H]
    dprobabilities = torch.einsum("thd,shd->hts", dout, v.to(wide))
    dscores = probabilities * (dprobabilities - delta.t()[:, :, None]) * scale
    dq = torch.einsum("hts,shd->thd", dscores, k.to(wide))
    dk = torch.einsum("hts,thd->shd", dscores, q.to(wide))
    dv = torch.einsum("hts,thd->shd", probabilities, dout)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def _softmax(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Probabilities `[H, T, S]`, zeros in a row that sees nothing, and log-sum-exp `[T, H]`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("thd,shd->hts", q.to(wide), k.to(wide)) * scale
    some = seen.any(1)[:, None]  # [T, 1]
    scores = scores.masked_fill(~seen, float("-inf")).masked_fill(~some, 0.0)  # softmax of -inf alone is NaN
    probabilities = torch.softmax(scores, -1).masked_fill(~seen, 0.0)
    lse = torch.logsumexp(scores, -1).t().masked_fill(~some, float("-inf"))
    return probabilities, lse.contiguous()
