"""Refusals of training options of experts: what is wrong, with its value, and what to do."""

from __future__ import annotations

from typing import Any

import plan_tiny as tiny
import pytest

from loongforge.core.errors import PlanError
from loongforge.core.plan import Plan

SHARED = tiny.EXPERTS | {"shared_ffn_hidden_size": 20}
OVERLAP = {"moe_shared_expert_overlap": True}
PADDED = {"moe_pad_expert_input_to_capacity": True}

UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}

REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"prediction_layers": 1, **UNIFORM},
        "parallel.recompute_num_layers=2 with mtp_num_layers=1: megatron-core recomputes further layers one by one",
    ),
    ({"moe_z_loss_coeff": 0.1}, "moe.moe_z_loss_coeff=0.1 needs experts, but the model is dense: leave it out."),
    (
        {"experts": tiny.EXPERTS, "moe_token_drop_policy": "position"},
        "moe.moe_token_drop_policy='position' drops nothing without a capacity: give moe_expert_capacity_factor",
    ),
    (
        {"experts": tiny.EXPERTS, **PADDED},
        "moe.moe_pad_expert_input_to_capacity=True needs a moe_expert_capacity_factor: give one",
    ),
    (
        {
            "experts": tiny.EXPERTS, **PADDED, "moe_expert_capacity_factor": 1.0,
            "moe_token_dispatcher_type": "allgather",
        },
        "moe.moe_pad_expert_input_to_capacity=True goes with moe_token_dispatcher_type='alltoall'",
    ),
    (
        {"experts": tiny.EXPERTS, **PADDED, "moe_expert_capacity_factor": 4.5},
        "moe.moe_expert_capacity_factor=4.5 pads an expert's input to more tokens than there are: use at most "
        "num_experts / topk = 4",
    ),
    ({"experts": tiny.EXPERTS, **OVERLAP}, "moe.moe_shared_expert_overlap=True needs a shared expert"),
    (
        {"experts": SHARED, **OVERLAP, "moe_token_dispatcher_type": "allgather"},
        "moe.moe_shared_expert_overlap=True goes with moe_token_dispatcher_type='alltoall'",
    ),
    (
        {
            "experts": SHARED, **OVERLAP, "recompute_granularity": "selective",
            "recompute_modules": ("shared_experts",),
        },
        "moe.moe_shared_expert_overlap=True cannot recompute the shared expert by itself",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "sentence"), REFUSALS)
def test_refusal(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError) as refused:
        Plan.of(tiny.run(**options), 1)
    assert sentence in str(refused.value)
    assert len(refused.value.problems) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"experts": tiny.EXPERTS, **PADDED, "moe_expert_capacity_factor": 4.0},
        {"experts": SHARED, **OVERLAP, "moe_z_loss_coeff": 0.1},
        {
            "experts": SHARED,
            **OVERLAP,
            "recompute_granularity": "selective",
            "recompute_modules": ("moe",),
        },
    ],
)
def test_options_that_can_run(options: dict[str, Any]) -> None:
    assert Plan.of(tiny.run(**options), 1).config.moe
