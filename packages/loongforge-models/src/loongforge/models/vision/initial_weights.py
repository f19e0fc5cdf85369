"""Fresh weights of encoders and projectors, the same on every layout."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import torch.distributed as dist


def initialise(module: torch.nn.Module, *, std: float, seed: int, tp: dist.ProcessGroup) -> None:
    """Fill every parameter: matrices from a normal distribution, biases with 0, norms with 1.

    Each parameter draws from a generator of its own, seeded by its name, and a tensor parallel rank keeps its part of
    the whole. megatron-core's tracker cannot serve: it knows the foundation's tensor parallel ranks alone.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                continue
            generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
            split = getattr(parameter, "tensor_model_parallel", False)
            dim = parameter.partition_dim if split else 0  # pyright: ignore[reportAttributeAccessIssue]
            shape = list(parameter.shape)
            shape[dim] *= tp.size() if split else 1
            whole = torch.normal(0.0, std, shape, generator=generator)
            if split:
                # A gate above an up matrix is two matrices, each split on its own.
                halves = whole.chunk(getattr(parameter, "partition_stride", 1), dim)
                whole = torch.cat([half.chunk(tp.size(), dim)[tp.rank()] for half in halves], dim)
            parameter.copy_(whole)
