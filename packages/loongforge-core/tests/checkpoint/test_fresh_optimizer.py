"""The state a fresh optimizer is given before a checkpoint is loaded into it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch


class FusedAdam(torch.optim.Optimizer):
    """Counts in its groups, as TransformerEngine's does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0, "step": 0})


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform import choose

    start_megatron(choose("cpu").platform())


@pytest.mark.parametrize(
    ("kind", "names"),
    [(torch.optim.AdamW, {"step", "exp_avg", "exp_avg_sq"}), (FusedAdam, {"exp_avg", "exp_avg_sq"})],
)
def test_a_parameter_has_what_its_optimizer_would_make(kind: Any, names: set[str]) -> None:
    """megatron-core asks a checkpoint for every tensor of the state, and none holds a `step` of a parameter."""
    from loongforge.core.checkpoint.optimizer_state import _prime

    parameter = torch.nn.Parameter(torch.ones(3))
    inner = kind([parameter])
    _prime(SimpleNamespace(optimizer=inner))
    assert inner.state[parameter].keys() == names
    assert not any(tensor.any() for tensor in inner.state[parameter].values())
