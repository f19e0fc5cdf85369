"""SwiGLU in plain torch: the truth that fast paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """y `[..., F]` from x `[..., 2F]`; see the package."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, up = x.to(wide).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)
