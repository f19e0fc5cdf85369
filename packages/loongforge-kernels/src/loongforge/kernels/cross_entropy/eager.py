"""Cross entropy in torch ops with its own backward.

The forward keeps the logits and one number per token; the backward makes the one `[T, V]` tensor there must be. Both
work on blocks of rows small enough for the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loongforge.kernels.cross_entropy.rows import to_gradient

BLOCK_BYTES = 4 << 20
"""Size of a block of wide logits."""


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        rows, flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        kept = flat != ignore_index
        index = flat.where(kept, 0).unsqueeze(1)
        loss = torch.empty(len(rows), 1, dtype=wide, device=rows.device)
        block = block_rows(rows)
        scratch = torch.empty(block, rows.shape[1], dtype=wide, device=rows.device)
        for at in range(0, len(rows), block):
            part = slice(at, at + block)
            some = rows[part].to(wide)
            logs = torch.log_softmax(some, -1, out=scratch[: len(some)])
            torch.neg(logs.gather(1, index[part]), out=loss[part])
        ctx.save_for_backward(rows, index, kept, loss)
        ctx.shape = logits.shape
        return loss.squeeze(1).where(kept, 0).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, index, kept, loss = ctx.saved_tensors
        factor = (grad.reshape(-1) * kept).unsqueeze(1)
        dlogits = torch.empty_like(rows)
        block = block_rows(rows)
        for at in range(0, len(rows), block):
            part = slice(at, at + block)
            if rows.dtype == loss.dtype:
                wide = torch.softmax(rows[part], -1, out=dlogits[part])
                to_gradient(wide, index[part], loss[part], factor[part])
            else:
                wide = torch.softmax(rows[part], -1, dtype=loss.dtype)
                dlogits[part] = to_gradient(wide, index[part], loss[part], factor[part])
        return dlogits.view(ctx.shape), None, None


def block_rows(rows: Tensor) -> int:
    """How many rows of `[T, V]` are worked on at a time; all of them on a device other than the CPU."""
    if rows.device.type != "cpu":
        return max(1, len(rows))
    return max(1, min(len(rows), BLOCK_BYTES // (4 * rows.shape[1])))


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """loss `[...]` from logits `[..., V]` and labels `[...]`; see the package."""
    return _CrossEntropy.apply(logits, labels, ignore_index)
