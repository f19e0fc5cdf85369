"""Ops of fla-core 0.6.0 (Triton, MIT, https://github.com/fla-org/flash-linear-attention) behind our signatures.

`linear_cross_entropy` is left out: theirs returns the sum or the mean of the losses, ours the loss of each token.
Nothing of it is imported on a CPU: its import asks Triton for a driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """y `[..., H]`; see `loongforge.kernels.rms_norm`. H holds at most 64 KiB."""
    return _of("modules.norm.layernorm", "rms_norm")(x, weight, None, eps=eps)


def swiglu(x: Tensor) -> Tensor:
    """y `[..., F]`; see `loongforge.kernels.swiglu`."""
    return _of("modules.activations", "swiglu")(*x.chunk(2, dim=-1))


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """y like x `[S, B, heads, D]`; see `loongforge.kernels.rope`. ValueError for shapes that fla does not rotate."""
    if x.ndim != 4 or cos.ndim != 4 or cos.shape[2] != 1 or x.shape[-1] > 256:
        raise ValueError(
            f"rope: fla rotates x [S, B, heads, D <= 256] by cos [S, 1 or B, 1, R / 2], not {tuple(x.shape)} by "
            f"{tuple(cos.shape)}: take impl='eager'."
        )
    wide = torch.promote_types(x.dtype, cos.dtype)
    angles = (part.to(wide).flatten(0, 2) for part in (cos, sin))  # [positions, R / 2]
    rows = x.to(wide).reshape(1, cos.shape[0] * cos.shape[1], -1, x.shape[-1])  # what one position turns: heads
    return _of("modules.rotary", "rotary_embedding")(rows, *angles, interleaved).view(x.shape).to(x.dtype)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """loss `[...]` fp32; see `loongforge.kernels.cross_entropy`."""
    rows = logits.reshape(-1, logits.shape[-1])
    function = _of("modules.fused_cross_entropy", "cross_entropy_loss")
    return function(rows, labels.reshape(-1), ignore_index=ignore_index)[0].view(labels.shape)


def causal_convolution(x: Tensor, weight: Tensor, ends: Sequence[int] | None = None) -> Tensor:
    """y `[B, T, C]`; see `loongforge.kernels.causal_convolution`."""
    function = _of("modules.causal_conv1d", "causal_conv1d")
    return function(x, weight, activation="silu", cu_seqlens=_ends(ends, x.device))[0]


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, ends: Sequence[int] | None = None
) -> Tensor:
    """o `[B, T, K, R, V]`; see `loongforge.kernels.gated_delta_rule`."""
    output: Tensor = _of("ops.gated_delta_rule", "chunk_gated_delta_rule")(
        q, k, v.flatten(2, 3), g=decay.flatten(2), beta=beta.flatten(2), use_qk_l2norm_in_kernel=True,
        cu_seqlens=_ends(ends, q.device),
    )[0]  # fmt: skip
    return output.view_as(v)


def _ends(ends: Sequence[int] | None, device: torch.device) -> Tensor | None:
    return None if ends is None else torch.tensor(ends, dtype=torch.int64, device=device)


def _of(module: str, name: str) -> Any:
    """A function of fla's; not imported before it is used."""
    return getattr(import_module(f"fla.{module}"), name)
