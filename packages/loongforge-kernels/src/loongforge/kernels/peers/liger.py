"""Five ops of liger-kernel 0.8.5 (Triton, BSD-2-Clause, https://github.com/linkedin/Liger-Kernel), our signatures.

Its functions write gradients over what they are given. Here inputs and incoming gradients stay as they were, which
costs a copy of them in `cross_entropy` and `rope`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """y `[..., H]`; see `loongforge.kernels.rms_norm`."""
    # "gemma" computes in fp32 and rounds once; an offset of 0 is added to the weight; dy is not overwritten
    return _of("rms_norm").LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)


def swiglu(x: Tensor) -> Tensor:
    """y `[..., F]`; see `loongforge.kernels.swiglu`."""
    rows = x.reshape(-1, x.shape[-1])  # its gradient has two dimensions, whatever x has
    return _of("swiglu").LigerFusedGateUpSiLUMulFunction.apply(rows).view(*x.shape[:-1], -1)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """y like x `[S, B, heads, D]`; see `loongforge.kernels.rope`. ValueError for what Liger does not rotate."""
    if interleaved or x.ndim != 4 or cos.ndim != 4 or cos.shape[2] != 1:
        raise ValueError(
            f"rope: liger rotates halves of x [S, B, heads, D] by cos [S, 1 or B, 1, R / 2], not "
            f"{'pairs' if interleaved else f'{tuple(x.shape)} by {tuple(cos.shape)}'}: take impl='eager'."
        )
    return _Rope.apply(x, cos, sin)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """loss `[...]` fp32; see `loongforge.kernels.cross_entropy`."""
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows.clone() if rows.dtype == torch.float32 else rows.float()  # it leaves the gradient there
    function = _of("cross_entropy").LigerCrossEntropyFunction
    loss = function.apply(rows, labels.reshape(-1), None, ignore_index, 0.0, 0.0, "none")[0]
    return loss.view(labels.shape)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor | None = None, ignore_index: int = -100,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """loss `[...]` fp32; see `loongforge.kernels.linear_cross_entropy`. Logits are computed in each pass anew.

    Raises ValueError for a vocabulary that ranks share.
    """
    if tp_group is not None:
        raise ValueError("linear_cross_entropy: liger takes a whole vocabulary, no tp_group: take impl='eager'.")
    rows = hidden.reshape(-1, hidden.shape[-1])
    function = _of("fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    loss = function.apply(
        rows, weight, labels.reshape(-1), None, None, ignore_index, 0.0, 0.0, "none", None, False, torch.float32
    )[0]
    return loss.view(labels.shape)


class _Rope(torch.autograd.Function):
    """One tensor in place of its pair of queries and keys; the second is of one head, and zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(_of("rope").rope_forward, x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turn(_of("rope").rope_backward, grad, *ctx.saved_tensors), None, None


def _turn(turn: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[S, B, heads, D]` as `turn` takes it, `[B, heads, S, D]` over memory `[B, S, heads, D]` that it writes to."""
    q = x.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    k = q.new_zeros(*q.shape[:2], 1, q.shape[3])
    angles = (part[:, :, 0].transpose(0, 1) for part in (cos, sin))  # [1 or B, S, R / 2]
    turned = turn(q.transpose(1, 2), k.transpose(1, 2), *angles, rotary_dim=2 * cos.shape[-1])[0]
    return turned.permute(2, 0, 1, 3).contiguous()


def _of(op: str) -> Any:
    """The module of Liger's that holds an op; not imported before it is used."""
    return import_module(f"liger_kernel.ops.{op}")
