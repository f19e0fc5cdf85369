"""The experts of a layer with one matrix product for all of them, forward and backward.

Weights stay those of `SequentialMLP`, an MLP for each expert: checkpoints and weight tables know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from loongforge.core.lora.table import ADAPTER
from loongforge.core.megatron.ops import kernels


@dataclass(frozen=True, kw_only=True)
class GroupedOps:
    """What the experts call; signatures as documented in `loongforge.kernels`."""

    linear: Callable[..., torch.Tensor]
    swiglu: Callable[..., torch.Tensor]
    line: str
    """What was chosen and why."""


def grouped_ops(device_type: str, dtype: torch.dtype) -> GroupedOps:
    """The best implementations for the device; torch's grouped product where a run asks for it on another one."""
    registry = kernels()
    swiglu = registry.choose("swiglu", device_type, dtype).call
    choice = registry.choose("grouped_linear", device_type, dtype)
    if choice.spec.impl != "eager":
        return GroupedOps(linear=choice.call, swiglu=swiglu, line=choice.line())

    from loongforge.kernels.grouped_linear.grouped_mm import grouped_linear

    return GroupedOps(linear=grouped_linear, swiglu=swiglu, line="grouped_linear: moe_grouped_gemm; using grouped_mm")


class GroupedExperts(SequentialMLP):
    """megatron-core's experts, computed together. With adapters on them each expert is computed by itself."""

    def __init__(self, *args: Any, ops: GroupedOps, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ops = ops

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Tokens `[T, H]`, expert after expert, how many each has, and their weights `[T]`; outputs `[T, H]`."""
        first, second = ([getattr(one, name) for one in self.local_experts] for name in ("linear_fc1", "linear_fc2"))
        if any(hasattr(linear, ADAPTER) for linear in (*first, *second)):
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        counts = tokens_per_expert.tolist()
        hidden = self.ops.linear(permuted_local_hidden_states, _weights(first), counts)
        hidden = self.ops.swiglu(hidden)
        hidden = (hidden * permuted_probs.unsqueeze(-1)).to(hidden.dtype)
        return self.ops.linear(hidden, _weights(second), counts), None


def _weights(linears: Sequence[Any]) -> list[torch.Tensor]:
    """The matrices, once whoever waits for their use has been told, as a call of the linear would tell it.

    megatron-core's overlapped gather of parameters hangs there: before its hook a weight is not there yet.
    """
    for linear in linears:
        for hook in linear._forward_pre_hooks.values():
            hook(linear, ())
    return [linear.weight for linear in linears]
