"""Cross entropy per token in plain torch: the truth that fast paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """loss `[...]` from logits `[..., V]` and labels `[...]`; see the package."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    flat = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).to(wide), labels.reshape(-1), ignore_index=ignore_index, reduction="none"
    )
    return flat.view(labels.shape)
