"""Ops of TransformerEngine 2.4 to 2.20.2 (CUDA and Triton, Apache-2.0, https://github.com/NVIDIA/TransformerEngine).

`rms_norm` and `swiglu` call its C++ functions as its own `pytorch.ops.RMSNorm` and `SwiGLU` do, alike in all those
versions. `cross_entropy` is taken from 2.18 on: before, the gradient was written over the logits.

Left out: `rope`, which there takes angles, while our cosines may be scaled (YaRN); `grouped_linear`, whose workspaces
and quantisers belong to a module and change with the version; `linear_cross_entropy`, which it does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """y `[..., H]`; see `loongforge.kernels.rms_norm`."""
    wide = torch.promote_types(x.dtype, weight.dtype)  # its kernels take one type
    rows = x.to(wide).reshape(-1, x.shape[-1]).contiguous()
    return _RMSNorm.apply(rows, weight.to(wide), eps).view(x.shape).to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """y `[..., F]`; see `loongforge.kernels.swiglu`."""
    return _SwiGLU.apply(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], -1)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """loss `[...]` fp32; see `loongforge.kernels.cross_entropy`. One backward pass for each forward pass."""
    rows = logits.reshape(1, -1, logits.shape[-1])
    function = _of("transformer_engine.pytorch.cross_entropy", "parallel_cross_entropy")
    return function(rows, labels.reshape(1, -1), ignore_idx=ignore_index).view(labels.shape)


@torch.no_grad()
def adamw(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor], *, step: int, lr: float, betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    """Update parameters and moments in place; see `loongforge.kernels.adamw`."""
    if not parameters:
        return
    optimizers = "transformer_engine.pytorch.optimizers"
    apply, adam = _of(optimizers, "multi_tensor_applier"), _of(optimizers, "multi_tensor_adam")
    lists = [list(tensors) for tensors in (gradients, parameters, first_moments, second_moments)]
    keep = torch.zeros(1, dtype=torch.int32, device=parameters[0].device)  # a one there would skip the step
    apply(adam, keep, lists, lr, *betas, eps, step, 1, 1, weight_decay)  # decoupled decay, moments corrected


class _RMSNorm(torch.autograd.Function):
    """Rows `[T, H]` and weight `[H]` of one type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kind = _of("transformer_engine.pytorch.constants", "TE_DType")[x.dtype]
        y, _, scale = _of("transformer_engine_torch", "rmsnorm_fwd")(x, weight, eps, None, None, kind, 0, False)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        back = _of("transformer_engine_torch", "rmsnorm_bwd")
        return *back(grad.contiguous(), x, scale, weight, 0, False), None


class _SwiGLU(torch.autograd.Function):
    """Rows `[T, 2F]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _of("transformer_engine_torch", "swiglu")(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _of("transformer_engine_torch", "dswiglu")(grad.contiguous(), *ctx.saved_tensors, None)


def _of(module: str, name: str) -> Any:
    """A function of TransformerEngine's; not imported before it is used."""
    import_module("transformer_engine.pytorch")  # loads the libraries that its C++ module needs
    return getattr(import_module(module), name)
