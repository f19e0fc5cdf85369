"""`attention_target(q, kv, indices, lse, *, scale) -> target`: what attention gives each chosen key, over all heads.

q `[T, H, D]`, kv `[S, D]` and indices `[T, K]` as for `sparse_mla`, lse `[T, H]` as it returned it. target `[T, K]`
fp32 (fp64 for fp64) is `sum_h exp(scale * q[t, h] . kv[s] - lse[t, h])`, 0 where the index is no key. A row sums to the
number of heads. This is what an indexer learns to predict (DeepSeek-V3.2, equation 3, before the normalization, which
`indexer_kl` does): under tensor parallelism the caller adds the ranks' targets first.

No gradient: the indexer learns from attention, not attention from the indexer.
On a GPU: the rotary part and the rest of D must be powers of two from 16 on, as 512 + 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loongforge.kernels.attention_target import reference
from loongforge.kernels.library import define


def _fake(q: Tensor, kv: Tensor, indices: Tensor, lse: Tensor, scale: float) -> Tensor:
    return q.new_empty(indices.shape, dtype=torch.promote_types(q.dtype, torch.float32))


_op = define(reference.attention_target, cuda="loongforge.kernels.attention_target.triton:attention_target", fake=_fake)


def attention_target(q: Tensor, kv: Tensor, indices: Tensor, lse: Tensor, *, scale: float) -> Tensor:
    """Sums of probabilities `[T, K]`; see the package."""
    return _op(q.detach(), kv.detach(), indices, lse.detach(), scale)
