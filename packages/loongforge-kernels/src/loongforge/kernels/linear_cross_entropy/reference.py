"""Linear layer and cross entropy in plain torch: the truth that fast paths are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from loongforge.kernels.cross_entropy.reference import cross_entropy
from loongforge.kernels.linear_cross_entropy.shard import shards


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor | None = None, ignore_index: int = -100,
    tp_group: dist.ProcessGroup | None = None, tp_rows: Sequence[int] | None = None, sum_hidden: bool = True,
    proportional: bool = False,
) -> Tensor:  # fmt: skip
    """loss `[...]`; see the package. Every rank computes all of it; `token_weight` and `proportional` do nothing."""
    if tp_group is None:
        return cross_entropy(hidden @ weight.t(), labels, ignore_index)
    sizes = shards(weight, tp_group) if tp_rows is None else tp_rows
    padded = F.pad(weight.detach(), (0, 0, 0, max(sizes) - len(weight)))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=tp_group)
    parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    parts[tp_group.rank()] = weight
    others = hidden if sum_hidden else hidden.detach()
    logits = [(hidden if part is weight else others) @ part.t() for part in parts]
    return cross_entropy(torch.cat(logits, -1), labels, ignore_index)
