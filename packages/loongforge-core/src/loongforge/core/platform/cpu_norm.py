"""The norm of gradients on a CPU, exact to fp32 whatever their size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loongforge.core.platform.substitution import Substitution

ROW = 4096
"""Numbers whose squares are added in fp32: the sum of so few is right to 1e-7 and still as fast as memory."""


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm `[1]`, fp32, of all numbers of fp32 tensors together; rows in fp32, their sum in fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors:
        flat = tensor.reshape(-1)
        whole = flat.numel() // ROW * ROW
        for rows in (flat[:whole].view(-1, ROW), flat[whole:].view(1, -1)):
            total += torch.linalg.vector_norm(rows, dim=1).double().square().sum()
    return total.sqrt().float().view(1)


def substitutions() -> tuple[Substitution, ...]:
    """Imports megatron-core, hence a function."""
    from megatron.core.optimizer import clip_grads

    def exact(original: Any) -> Any:
        return lambda chunk, flag, lists, per_tensor, *rest: (norm_of([one for each in lists for one in each]), None)

    return (
        Substitution(
            owner=clip_grads,
            name="l2_norm_impl",
            make=exact,
            why="torch.norm adds a CPU tensor's squares in fp32 one after another: of 28 million it loses 0.16 %, and "
            "gradients are clipped by it",
            upstream="utils.py local_multi_tensor_l2_norm, used by optimizer/clip_grads.py",
            remove_when="torch.norm of a large fp32 CPU tensor agrees with fp64 to 1e-6",
        ),
    )
