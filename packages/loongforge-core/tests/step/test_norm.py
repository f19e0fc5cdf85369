"""The norm over all components: what is not finite in one of them is not finite in all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """megatron-core, and a job of one process."""
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform import choose

    start_megatron(choose("cpu").platform())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def norm(foundation: float | None, tower: float | None) -> float:
    """Of all gradients, where this rank knows the norms of these components."""
    from loongforge.core.step.forward import global_norm

    optimizers = [
        None if one is None else SimpleNamespace(get_grad_norm=lambda one=one: one) for one in (foundation, tower)
    ]
    training: Any = SimpleNamespace(optimizer=optimizers[0], tower_optimizer=optimizers[1])
    plan: Any = SimpleNamespace(encoder=object())
    # The way of a rank alone, and that of several: the group here has one process.
    worlds: list[Any] = [SimpleNamespace(device=torch.device("cpu"), size=size) for size in (1, 2)]
    one, several = (global_norm(plan, world, training) for world in worlds)
    assert one == several
    return one


def test_components_add_up() -> None:
    assert norm(3.0, 4.0) == 5.0
    assert norm(3.0, None) == norm(None, 3.0) == 3.0


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1])
def test_one_that_is_not_finite_shows(wrong: float, place: int) -> None:
    """An encoder's infinity once became the root of the largest number, and the update went through."""
    known: list[float | None] = [1.0, 1.0]
    known[place] = wrong
    assert not math.isfinite(norm(*known))
