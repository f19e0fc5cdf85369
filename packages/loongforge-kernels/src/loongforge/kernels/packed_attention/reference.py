"""Attention of packed parts as it is written down: all scores of a row at once."""

from __future__ import annotations

import torch
from torch import Tensor

from loongforge.kernels.packed_attention.parts import Parts


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, parts: Parts, scale: float, causal: bool = True
) -> Tensor:
    """output `[T, H, D]`; see the package."""
    heads = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(heads, dim=1) for tensor in (key, value))
    scores = torch.einsum("thd,chd->htc", query, key) * scale
    of_query, of_key, last = [], [], []
    for part, (queries, keys) in enumerate(zip(parts.queries, parts.keys, strict=True)):
        of_query += [part] * queries
        of_key += [part] * keys
        last += range(keys - queries, keys) if causal else [keys - 1] * queries
    place = torch.tensor([at for keys in parts.keys for at in range(keys)], device=query.device)
    mine = torch.tensor(of_query, device=query.device)[:, None] == torch.tensor(of_key, device=query.device)
    seen = mine & (place <= torch.tensor(last, device=query.device)[:, None])  # [T, C]
    return torch.einsum("htc,chd->thd", torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1), value)
