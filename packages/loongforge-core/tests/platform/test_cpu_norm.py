"""Norms of gradients on a CPU."""

from __future__ import annotations

import pytest
import torch

from loongforge.core.platform.cpu_norm import ROW, norm_of

RELATIVE = 2e-7
"""One rounding to fp32 (6e-8) of a sum whose rows are right to about 1e-7, and those errors average out."""


def gradients(numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0)) * 1e-4


@pytest.mark.parametrize("sizes", [(1,), (ROW,), (ROW - 1, ROW + 1), (3 * ROW + 5, 0, 7), (4_000_000,)])
def test_it_is_the_norm_of_everything_together(sizes: tuple[int, ...]) -> None:
    tensors = [gradients(size) for size in sizes]
    truth = torch.cat(tensors).double().norm().item()
    assert norm_of(tensors).item() == pytest.approx(truth, rel=RELATIVE)


def test_no_gradients_and_unsound_ones() -> None:
    assert norm_of([]).item() == 0
    assert norm_of([torch.tensor([1.0, float("inf")])]).item() == float("inf")
    assert torch.isnan(norm_of([torch.tensor([1.0, float("nan")])])).all()


def test_shapes_and_strides_do_not_matter() -> None:
    matrix = gradients(6 * ROW).view(6, ROW)
    assert norm_of([matrix.t()]).item() == pytest.approx(matrix.double().norm().item(), rel=RELATIVE)


def test_upstream_still_needs_it() -> None:
    """When this fails, torch sums in fp32 well enough and `cpu_norm` can go."""
    large = gradients(8_000_000)
    assert abs(torch.norm(large).item() / large.double().norm().item() - 1) > 1e-5
