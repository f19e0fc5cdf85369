"""Every loss of the routers, and dropping, equal their definitions on transformers' logits: loss and each gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loongforge.core.config.experts import ExpertConfig
from loongforge.core.config.run import ParallelConfig
from loongforge.core.testing import run_distributed

TOLERANCE = 2e-5
"""Relative, fp32. Measured: below 3e-6 in every case here. A wrong factor is off by 1e-2 and more."""

LAYOUTS: dict[str, dict[str, int]] = {
    "one": {"world": 1},
    "dp2": {"world": 2},
    "tp2": {"world": 2, "tp": 2},
    "ep2": {"world": 2, "ep": 2},
    "pp2": {"world": 2, "pp": 2},
    "cp2": {"world": 2, "cp": 2},
}
BALANCE = ("aux_loss", "seq_aux_loss", "global_aux_loss")
Z_LOSS = ExpertConfig(moe_z_loss_coeff=0.05)
MICRO_BATCH = 2


def balanced(plain: Any, kind: str, coeff: float = 0.3) -> Any:
    return replace(plain, experts=replace(plain.experts, aux_loss_coeff=coeff, load_balancing=kind))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", BALANCE)
def test_balance_and_z_loss_equal_their_definitions(kind: str, layout: str, tiny: Any) -> None:
    geometry, where = balanced(tiny.qwen3_moe(), kind), tiny.layout(**LAYOUTS[layout])
    expected, weights = tiny.reference_gradients(geometry, Z_LOSS, dp=where.dp, micro_batch=MICRO_BATCH)
    found = run_distributed(
        lambda worker: tiny.measure(
            geometry, where, worker, weights, moe=Z_LOSS, micro_batch=MICRO_BATCH, training=True
        ),
        where.world,
    )
    assert max(rank.loss for rank in found) == pytest.approx(expected.loss, rel=1e-6)
    difference, name = tiny.worst(found, expected)
    assert difference < TOLERANCE, name
    assert [rank.balance for rank in found] == pytest.approx([expected.balance] * where.world, rel=1e-5)
    assert [rank.z_loss for rank in found] == pytest.approx([expected.z_loss] * where.world, rel=1e-5)


@pytest.mark.parametrize("layout", ["one", "tp2"])
@pytest.mark.parametrize("kind", ["seq_aux_loss", "global_aux_loss"])
def test_losses_of_sigmoid_routing_behind_a_dense_layer(kind: str, layout: str, tiny: Any) -> None:
    geometry, where = balanced(tiny.deepseek3(), kind), tiny.layout(**LAYOUTS[layout])
    expected, weights = tiny.reference_gradients(geometry, Z_LOSS, dp=where.dp)
    found = run_distributed(
        lambda worker: tiny.measure(geometry, where, worker, weights, moe=Z_LOSS, training=True), where.world
    )
    difference, name = tiny.worst(found, expected)
    assert difference < TOLERANCE, name
    assert found[0].balance == pytest.approx(expected.balance, rel=1e-5)
    assert found[0].z_loss == pytest.approx(expected.z_loss, rel=1e-5)
    assert list(found[0].loads) == [1]


def test_none_leaves_the_balance_loss_out(tiny: Any) -> None:
    geometry = balanced(tiny.qwen3_moe(), "none")
    expected, weights = tiny.reference_gradients(tiny.qwen3_moe())
    found = run_distributed(lambda worker: tiny.measure(geometry, tiny.layout(1), worker, weights, training=True), 1)
    difference, name = tiny.worst(found, expected)
    assert difference < TOLERANCE, name
    assert found[0].balance is None
    assert found[0].z_loss is None


def test_recomputation_counts_and_weighs_once(tiny: Any) -> None:
    geometry, parallel = balanced(tiny.qwen3_moe(), "global_aux_loss"), ParallelConfig(recompute_granularity="full")
    expected, weights = tiny.reference_gradients(geometry, Z_LOSS)
    found = run_distributed(
        lambda worker: tiny.measure(
            geometry, tiny.layout(1), worker, weights, moe=Z_LOSS, parallel=parallel, training=True
        ),
        1,
    )
    difference, name = tiny.worst(found, expected)
    assert difference < TOLERANCE, name
    assert found[0].loads == expected.loads
    assert found[0].z_loss == pytest.approx(expected.z_loss, rel=1e-5)


@pytest.mark.parametrize("layout", ["one", "tp2", "ep2", "pp2", "cp2"])
def test_loads_are_the_choices_of_transformers(layout: str, tiny: Any) -> None:
    geometry, where = tiny.qwen3_moe(), tiny.layout(**LAYOUTS[layout])
    expected, weights = tiny.reference_gradients(geometry)
    assert [len({load.imbalance, load.least, load.idle}) > 1 for load in expected.loads.values()] == [True, True]
    found = run_distributed(lambda worker: tiny.measure(geometry, where, worker, weights, training=True), where.world)
    for rank in found:
        assert rank.loads == expected.loads


CAPACITY = [
    ExpertConfig(moe_expert_capacity_factor=0.8),
    ExpertConfig(moe_expert_capacity_factor=0.8, moe_token_drop_policy="position"),
    ExpertConfig(moe_expert_capacity_factor=0.8, moe_pad_expert_input_to_capacity=True),
    ExpertConfig(
        moe_expert_capacity_factor=1.1, moe_token_drop_policy="position", moe_pad_expert_input_to_capacity=True
    ),
]
POLICIES = ["probs", "position", "probs padded", "position padded"]


@pytest.mark.parametrize("layout", ["one", "tp2", "ep2"])
@pytest.mark.parametrize("capacity", CAPACITY, ids=POLICIES)
def test_dropping_equals_its_definition(capacity: ExpertConfig, layout: str, tiny: Any) -> None:
    geometry, where = balanced(tiny.qwen3_moe(), "aux_loss"), tiny.layout(**LAYOUTS[layout])
    expected, weights = tiny.reference_gradients(
        geometry, capacity, dp=where.dp, micro_batch=MICRO_BATCH, parts=where.tp
    )
    dispatchers = ("alltoall",) if capacity.moe_pad_expert_input_to_capacity else ("alltoall", "allgather")
    for dispatcher in dispatchers:
        moe = replace(capacity, moe_token_dispatcher_type=dispatcher)
        found = run_distributed(
            lambda worker, moe=moe: tiny.measure(
                geometry, where, worker, weights, moe=moe, micro_batch=MICRO_BATCH, training=True
            ),
            where.world,
        )
        assert max(rank.loss for rank in found) == pytest.approx(expected.loss, rel=1e-6)
        difference, name = tiny.worst(found, expected)
        assert difference < TOLERANCE, (dispatcher, name)
        dropped = [1 - share for share in expected.kept]
        assert min(dropped) > 0.01, "something is dropped"
        assert [load.dropped for load in found[0].loads.values()] == pytest.approx(dropped, rel=1e-6)


def test_a_large_capacity_drops_nothing(tiny: Any) -> None:
    geometry = tiny.qwen3_moe()
    expected, weights = tiny.reference_gradients(geometry)
    for moe in (
        ExpertConfig(moe_expert_capacity_factor=3.0),  # every token fits into every expert
        ExpertConfig(moe_expert_capacity_factor=3.0, moe_pad_expert_input_to_capacity=True),
        ExpertConfig(moe_expert_capacity_factor=30.0),
    ):
        found = run_distributed(
            lambda worker, moe=moe: tiny.measure(geometry, tiny.layout(1), worker, weights, moe=moe, training=True), 1
        )
        difference, name = tiny.worst(found, expected)
        assert difference < TOLERANCE, name
        assert [load.dropped for load in found[0].loads.values()] == [0.0, 0.0]


@pytest.mark.parametrize("layout", ["one", "tp2", "ep2"])
def test_the_shared_expert_may_overlap_with_the_exchange(layout: str, tiny: Any) -> None:
    """Where streams run one after the other it is another order of the same sums."""
    geometry, where = tiny.deepseek3(), tiny.layout(**LAYOUTS[layout])
    expected, weights = tiny.reference_gradients(geometry)
    moe = ExpertConfig(moe_shared_expert_overlap=True)
    again = ParallelConfig(recompute_granularity="selective", recompute_modules=("moe",))
    found = run_distributed(
        lambda worker: tiny.measure(
            geometry, where, worker, weights, moe=moe, parallel=again if layout == "one" else None, training=True
        ),
        where.world,
    )
    assert max(rank.loss for rank in found) == pytest.approx(expected.loss, rel=1e-6)
    difference, name = tiny.worst(found, expected)
    assert difference < TOLERANCE, name


@pytest.mark.parametrize("layout", ["ep2", "tp2"])
def test_the_all_gather_brings_tokens_to_the_same_experts(layout: str, tiny: Any) -> None:
    geometry, where = tiny.deepseek3(), tiny.layout(**LAYOUTS[layout])
    expected, weights = tiny.reference_gradients(geometry)
    moe = ExpertConfig(moe_token_dispatcher_type="allgather")
    found = run_distributed(lambda worker: tiny.measure(geometry, where, worker, weights, moe=moe), where.world)
    assert max(rank.loss for rank in found) == pytest.approx(expected.loss, rel=1e-6)
    difference, name = tiny.worst(found, expected)
    assert difference < TOLERANCE, name


def test_an_exchange_that_the_platform_cannot_do_is_refused(tiny: Any) -> None:
    import torch

    from loongforge.core.errors import ConfigError
    from loongforge.core.megatron.experts import expert_options
    from loongforge.core.megatron.specs import layers_for
    from loongforge.core.platform import choose

    experts, where = tiny.deepseek3().experts, tiny.layout(2, tp=2, etp=2)
    layers = layers_for(choose("cpu").platform(), torch.float32)
    even, uneven = (replace(layers, uneven_gather=gathers) for gathers in (False, True))
    asked = ExpertConfig(moe_token_dispatcher_type="alltoall")
    for training, word in (
        (asked, "moe_token_dispatcher_type='alltoall'"),
        (ExpertConfig(moe_shared_expert_overlap=True), "moe_shared_expert_overlap=True"),
        (
            ExpertConfig(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True),
            "moe_pad_expert_input_to_capacity=True",
        ),
    ):
        with pytest.raises(ConfigError, match=f"moe.{word} with expert_tensor_parallel_size=2 gathers"):
            expert_options(experts, training, 2, where, even)
        assert expert_options(experts, training, 2, where, uneven)["moe_token_dispatcher_type"] == "alltoall"
    assert expert_options(experts, ExpertConfig(), 2, where, even)["moe_token_dispatcher_type"] == "allgather"
