"""Features at their places: values, gradients, and what is not copied."""

from __future__ import annotations

import pytest
import torch

from loongforge.core.errors import DataError
from loongforge.core.megatron.visual import add, merge
from loongforge.core.model.contract import Visual

POSITIONS = torch.tensor([1, 4, 5])


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(7)
    return torch.randn(4, 2, 6, dtype=dtype, requires_grad=True), torch.randn(3, 2, 6, requires_grad=True)


def reference(kind: str, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    first = rows[:, 0].to(hidden.dtype)
    return hidden.flatten(0, 1).index_put((POSITIONS,), first, accumulate=kind == "add").view_as(hidden)


def ours(kind: str, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if kind == "merge":
        return merge(hidden, Visual(rows=rows, positions=POSITIONS))
    return add(hidden, rows[:, 0].to(hidden.dtype), POSITIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["merge", "add"])
def test_values_and_gradients_are_torchs(kind: str, dtype: torch.dtype) -> None:
    found, grads = [], []
    for call in (reference, ours):
        hidden, rows = inputs(dtype)
        output = call(kind, hidden * 2, rows)
        output.square().sum().backward()
        found.append(output.detach())
        grads.append((hidden.grad, rows.grad))
    assert torch.equal(*found)
    for right, left in zip(*grads, strict=True):
        assert right is not None
        assert left is not None
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@pytest.mark.parametrize("kind", ["merge", "add"])
def test_nothing_is_copied(kind: str) -> None:
    hidden, rows = inputs()
    output = hidden * 2
    assert ours(kind, output, rows).data_ptr() == output.data_ptr()


def test_no_feature_leaves_the_hidden_states_and_still_reaches_the_encoder() -> None:
    hidden, _ = inputs()
    weight = torch.ones(6, requires_grad=True)
    rows = torch.zeros(0, 2, 6) * weight
    before = hidden * 2
    output = merge(before, Visual(rows=rows, positions=torch.zeros(0, dtype=torch.int64)))
    assert output.data_ptr() == before.data_ptr()
    output.sum().backward()
    assert torch.equal(hidden.grad, torch.full_like(hidden, 2.0))
    assert torch.equal(weight.grad, torch.zeros(6))


def test_frozen_embedding_and_frozen_encoder_can_be_recomputed_from() -> None:
    hidden, rows = (one.detach() for one in inputs())
    output = merge(hidden, Visual(rows=rows, positions=POSITIONS))
    assert not output.requires_grad
    output.requires_grad_()
    (output * 3).sum().backward()
    assert torch.equal(output.grad, torch.full_like(hidden, 3.0))


def test_autograd_notices_hidden_states_that_were_needed() -> None:
    hidden, rows = inputs()
    output = (hidden * 2).exp()  # keeps its result for the backward pass
    merged = merge(output, Visual(rows=rows, positions=POSITIONS))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        merged.sum().backward()


def test_other_numbers_of_features_and_positions_are_refused() -> None:
    hidden, rows = inputs()
    with pytest.raises(DataError, match="3 positions for features on this rank, the encoder gave 2"):
        merge(hidden, Visual(rows=rows[:2], positions=POSITIONS))
