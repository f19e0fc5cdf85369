"""Linear layer and cross entropy in plain torch: the truth that fast paths are compared with."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from loongforge.kernels.cross_entropy.reference import cross_entropy


def shards(weight: Tensor, group: dist.ProcessGroup) -> list[int]:
    """How many rows of weight each rank of a group has."""
    sizes = torch.empty(group.size(), dtype=torch.int64, device=weight.device)
    dist.all_gather_into_tensor(sizes, sizes.new_tensor([len(weight)]), group=group)
    return sizes.tolist()


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor | None = None, ignore_index: int = -100,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """loss `[...]`; see the package. `token_weight` has no effect here, and every rank computes the whole."""
    if tp_group is not None:
        sizes = shards(weight, tp_group)
        padded = F.pad(weight.detach(), (0, 0, 0, max(sizes) - len(weight)))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=tp_group)
        parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        parts[tp_group.rank()] = weight
        weight = torch.cat(parts)
    return cross_entropy(hidden @ weight.t(), labels, ignore_index)
