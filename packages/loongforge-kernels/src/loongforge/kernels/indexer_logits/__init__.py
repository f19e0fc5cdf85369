"""`indexer_logits(q, k, w, ks, ke, *, relu=True, k_scale=None) -> logits`: how much each query wants each key.

`logits[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s])` for `ks[t] <= s < ke[t]`, else -inf: equation 1 of DeepSeek-V3.2,
whose factors `heads^-0.5 * width^-0.5` are in w. w may be negative; without `relu` the products are taken as they are.
q `[T, H, D]` and k `[S, D]` of one floating dtype, w `[T, H]` floating, ks and ke int32 `[T]` within `[0, S]`; logits
`[T, S]` fp32 (fp64 for fp64 q). q and k may be float8_e4m3fn: q's scales belong into w, k's into `k_scale` fp32 `[S]`,
which multiplies the logits of its key and is not negative. Not differentiable: `lightning_indexer` is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loongforge.kernels.indexer_logits import reference
from loongforge.kernels.library import define


def _logits(q: Tensor, k: Tensor, w: Tensor, ks: Tensor, ke: Tensor, relu: bool, k_scale: Tensor | None) -> Tensor:
    return reference.indexer_logits(q, k, w, ks, ke, relu=relu, k_scale=k_scale)


def _fake(q: Tensor, k: Tensor, w: Tensor, ks: Tensor, ke: Tensor, relu: bool, k_scale: Tensor | None) -> Tensor:
    return q.new_empty(q.shape[0], k.shape[0], dtype=reference.wide(q))


_op = define(_logits, name="indexer_logits", cuda="loongforge.kernels.indexer_logits.triton:indexer_logits", fake=_fake)


@torch.no_grad()
def indexer_logits(
    q: Tensor, k: Tensor, w: Tensor, ks: Tensor, ke: Tensor, *, relu: bool = True, k_scale: Tensor | None = None
) -> Tensor:
    """logits `[T, S]` from q `[T, H, D]`, k `[S, D]` and w `[T, H]`; see the package."""
    return _op(q, k, w, ks, ke, relu, k_scale)
