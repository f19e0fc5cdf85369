"""`masked_mha(q, k, v, bits, ks, ke, scale) -> (out, lse)`: attention of each query to the keys whose bit is set.

q `[T, H, DQK]`, k `[S, H, DQK]`, v `[S, H, DV]` of one floating dtype; out `[T, H, DV]` in it, lse `[T, H]` fp32 (fp64
for fp64). Query t attends to the keys s of `[ks[t], ke[t])` (int32 `[T]`; what packing, causality and context
parallelism leave) whose bit `s % 32` of `bits[t, s // 32]` is set (int32 `[T, ceil(S / 32)]`, made by
`selection_bits`); to all of that range when bits is None, which is plain causal attention over packed documents.
`out[t, h] = sum_s softmax_s(scale * q[t, h] . k[s, h]) v[s, h]`, `lse` the natural logarithm of the softmax's
denominator. A query without keys has output 0, lse -inf and no gradient.

With the keys that an indexer chose this is DeepSeek Sparse Attention before the absorption of the up-projection
(DeepSeek-V3.2, equation 2): the same result as `sparse_mla`, computed as ordinary attention, heads independent.
Differentiable in q, k and v through both results; bit-equal from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loongforge.kernels.library import define
from loongforge.kernels.masked_mha import reference


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=wide)


def _fake_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_forward = define(reference.masked_mha, cuda="loongforge.kernels.masked_mha.triton:forward", fake=_fake)
_backward = define(
    reference.masked_mha_backward, cuda="loongforge.kernels.masked_mha.triton:backward", fake=_fake_backward
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    return *_backward(*tensors, ctx.scale, out, lse, dout, dlse), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def masked_mha(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor | None, ks: Tensor, ke: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, DV]` and log-sum-exp `[T, H]`; see the package."""
    return _forward(q, k, v, bits, ks, ke, scale)
