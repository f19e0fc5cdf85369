"""A norm over heads that tensor parallel ranks share equals the norm of one process, gradients included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loongforge.core.testing import run_distributed

HEAD, TOKENS, EPS = 6, 5, 1e-3


def numbers(heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input `[S, 1, heads, D]`, weight, and what the loss multiplies the output with."""
    generator = torch.Generator().manual_seed(3)
    shape = (TOKENS, 1, heads, HEAD)
    made = [torch.randn(size, generator=generator) for size in (shape, (heads * HEAD,), shape)]
    return made[0], made[1], made[2]


def part(tensor: torch.Tensor, rank: int, ranks: int, heads: int) -> torch.Tensor:
    """The heads of a rank; with more ranks than heads several ranks have the same one."""
    count = max(1, heads // ranks)
    first = rank * heads // ranks
    return tensor[..., first : first + count, :].detach().clone()


def run(worker: Any, heads: int, pull: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output of this rank and gradients of its input and of the whole weight; `pull` is the loss's factor."""
    from loongforge.core.config.run import ParallelConfig
    from loongforge.core.megatron.groups import join
    from loongforge.core.megatron.whole_norm import WholeNorm
    from loongforge.core.plan.layout import Layout
    from loongforge.core.platform import choose

    ranks = worker.world_size
    layout = Layout.of(ParallelConfig(tensor_model_parallel_size=ranks), ranks)
    config = SimpleNamespace(
        normalization="RMSNorm", layernorm_zero_centered_gamma=False, params_dtype=torch.float32,
        sequence_parallel=False,
    )  # fmt: skip
    with join(layout, worker, choose("cpu").platform(), 1.0) as world:
        norm = WholeNorm(config, HEAD, EPS, heads)
        norm.group = world.tp
        hidden, weight, _ = numbers(heads)
        norm.weight.data.copy_(weight)
        mine = part(hidden, worker.rank, ranks, heads).requires_grad_()
        out = norm(mine)
        (out * part(pull, worker.rank, ranks, heads)).sum().backward()
        assert mine.grad is not None
        assert norm.weight.grad is not None
        return out.detach(), mine.grad, norm.weight.grad


@pytest.mark.parametrize(("heads", "ranks"), [(4, 1), (4, 2), (8, 4), (2, 4)])
def test_norm_of_shared_heads(heads: int, ranks: int, tiny: Any) -> None:
    hidden, weight, pull = numbers(heads)
    hidden.requires_grad_()
    weight.requires_grad_()
    expected = torch.nn.functional.rms_norm(hidden.flatten(-2), weight.shape, weight, EPS).view_as(hidden)
    copies = max(1, ranks // heads)  # of a head, each with its own part of the loss
    (expected * pull * copies).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    found = run_distributed(lambda worker: run(worker, heads, pull), ranks)
    gradient = torch.zeros_like(hidden)
    for rank, (out, mine, _) in enumerate(found):
        torch.testing.assert_close(out, part(expected, rank, ranks, heads))
        first = rank * heads // ranks
        gradient[..., first : first + mine.size(-2), :] += mine
    torch.testing.assert_close(gradient, hidden.grad)
    # megatron-core sums it over tensor parallel ranks.
    torch.testing.assert_close(sum(one for _, _, one in found), weight.grad)
