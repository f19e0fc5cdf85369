"""Linear layer and cross entropy in plain torch: the truth that fast paths are compared with."""

from __future__ import annotations

from torch import Tensor

from loongforge.kernels.cross_entropy.reference import cross_entropy


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """loss `[...]`; see the package. `token_weight` has no effect here."""
    return cross_entropy(hidden @ weight.t(), labels, ignore_index)
