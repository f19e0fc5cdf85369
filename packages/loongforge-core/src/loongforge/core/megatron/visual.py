"""Features of an encoder take the places that the text keeps for them.

Both operations write into the hidden states they are given, which nothing else may need: the output of the embedding
or of a layer. Neither copies them, forward or backward, unless features replace what has a gradient of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from loongforge.core.errors import DataError
from loongforge.core.model.contract import Visual


def merge(hidden: torch.Tensor, visual: Visual) -> torch.Tensor:
    """Put the last level's features at their positions; `[S, B, H]` to the same memory.

    Without a feature the result still depends on `rows`, so that the encoder takes part in every backward pass.
    Raises `DataError` where features and positions differ in number.
    """
    rows, positions = visual.rows, visual.positions
    if rows.size(0) != positions.numel():
        raise DataError(
            f"A micro-batch has {positions.numel()} positions for features on this rank, the encoder gave "
            f"{rows.size(0)}: visual_positions of the data and the encoder's features per item must agree."
        )
    return _Put.apply(hidden, rows[:, 0].to(hidden.dtype), positions)  # pyright: ignore[reportReturnType]


def add(hidden: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Add `rows` `[n, H]` at `positions` int64 `[n]` of `hidden` `[S, B, H]`, flattened; the same memory."""
    return _Add.apply(hidden, rows, positions)  # pyright: ignore[reportReturnType]


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(positions)
        # `detach` shares the version counter: autograd notices if someone did save what is overwritten here.
        _tokens(hidden.detach()).index_copy_(0, positions, rows)
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (positions,), (grad,) = ctx.saved_tensors, grads
        tokens = grad.reshape(-1, grad.size(-1))
        rows = tokens[positions] if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[0] and positions.numel():
            grad = tokens.index_fill(0, positions, 0).view_as(grad)
        return grad, rows, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(positions)
        _tokens(hidden.detach()).index_add_(0, positions, rows)
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        (positions,), (grad,) = ctx.saved_tensors, grads
        rows = grad.reshape(-1, grad.size(-1))[positions] if ctx.needs_input_grad[1] else None
        return grad, rows, None


def _tokens(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.view(-1, hidden.size(-1))
