"""What attention gives to each chosen key, summed over heads, as it is written down."""

from __future__ import annotations

import torch
from torch import Tensor

from loongforge.kernels.sparse_mla.reference import gathered


def attention_target(q: Tensor, kv: Tensor, indices: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Sums of probabilities `[T, K]`; see the package."""
    wide = torch.promote_types(q.dtype, torch.float32)
    picked, valid = gathered(kv.detach().to(wide), indices)
    scores = torch.einsum("thd,tkd->thk", q.detach().to(wide), picked) * scale
    lse = lse.detach().to(wide)
    shares = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None])
    return shares.masked_fill(~valid[:, None] | lse.isinf()[..., None], 0.0).sum(1).contiguous()
