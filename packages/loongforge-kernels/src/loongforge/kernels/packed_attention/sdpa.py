"""Attention of packed parts by torch's own attention, one call for each part: any device, any type, and dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loongforge.kernels.packed_attention.parts import Parts


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, parts: Parts, scale: float, causal: bool = True, dropout: float = 0.0
) -> Tensor:
    """output `[T, H, D]`; see the package. `dropout` is the share of attention weights set to 0."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None
        if causal and q.size(2) != k.size(2):  # torch counts from the first key, we from the last
            seen = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device)
            mask = seen.tril_(k.size(2) - q.size(2))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scale,
            enable_gqa=k.size(1) != q.size(1),
        )  # fmt: skip

    return parts.each(attend, query, key, value)
