"""`sparse_mla(q, kv, indices, *, scale, d_v=512, attn_sink=None, deterministic=False) -> (out, lse)`: absorbed MLA.

Multi-head latent attention with the up-projection absorbed, so that all heads share one key row, over the rows that an
indexer chose (DeepSeek-V3.2, equation 2, in the multi-query form of its section 2.1). q `[T, H, D]` and kv `[S, D]` of
one floating dtype; the first `d_v` columns of a kv row are also its value, the others are the rotary part (512 + 64).
indices `[T, K]` int32 are rows of kv, in any order; whatever lies outside `[0, S)` is no key. With p the softmax over
a query's keys of `scale * q[t, h] . kv[s]`: out `[T, H, d_v]` in the inputs' dtype is `sum_s p_s kv[s, :d_v]`, lse
`[T, H]` fp32 (fp64 for fp64) the natural logarithm of the softmax's denominator. A query without keys has output 0,
lse -inf and no gradient.

attn_sink `[H]` fp32 adds exp(attn_sink[h]) to the denominator of the output, not to lse.
Differentiable in q, kv and attn_sink through both results. The gradient of kv is summed by atomics in fp32, in an order
that changes from run to run; with `deterministic`, or under `torch.use_deterministic_algorithms`, in a fixed one.
On a GPU: heads up to 128, `d_v` a power of two from 32 on, the rotary part one from 16 on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loongforge.kernels.library import define
from loongforge.kernels.sparse_mla import reference


def _fake(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, d_v: int = 512, *rest: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:2], d_v), q.new_empty(q.shape[:2], dtype=wide)


def _fake_backward(
    q: Tensor, kv: Tensor, indices: Tensor, attn_sink: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    dsink = q.new_empty(0, dtype=wide) if attn_sink is None else torch.empty_like(attn_sink)
    return q.new_empty(q.shape), kv.new_empty(kv.shape), dsink


_forward = define(reference.sparse_mla, cuda="loongforge.kernels.sparse_mla.triton:forward", fake=_fake)
_backward = define(
    reference.sparse_mla_backward, cuda="loongforge.kernels.sparse_mla.triton:backward", fake=_fake_backward
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, indices, ctx.scale, _, attn_sink, ctx.deterministic = inputs
    ctx.save_for_backward(q, kv, indices, attn_sink, *output)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    dq, dkv, dsink = _backward(*tensors, ctx.scale, ctx.deterministic, out, lse, dout, dlse)
    return dq, dkv, None, None, None, None if tensors[3] is None else dsink, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def sparse_mla(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    *,
    scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, d_v]` and log-sum-exp `[T, H]`; see the package."""
    fixed = deterministic or torch.are_deterministic_algorithms_enabled()
    return _forward(q, kv, indices, scale, d_v, attn_sink, fixed)
