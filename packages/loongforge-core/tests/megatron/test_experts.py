"""Mixture of experts equals transformers in one process, and every layout equals it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loongforge.core.config.experts import ExpertConfig
from loongforge.core.config.run import ParallelConfig
from loongforge.core.testing import run_distributed

TOLERANCE = 2e-5
"""Relative, fp32. Measured: below 3e-6 in every case here. A wrong gradient is off by 1e-2 and more."""

LAYOUTS: dict[str, dict[str, int]] = {
    "dp2": {"world": 2},
    "tp2": {"world": 2, "tp": 2, "etp": 2},
    "tp2, experts whole": {"world": 2, "tp": 2},
    "ep2": {"world": 2, "ep": 2},
    "tp2 ep2": {"world": 4, "tp": 2, "ep": 2},
    "tp2 ep2 etp2": {"world": 4, "tp": 2, "ep": 2, "etp": 2},
    "pp2": {"world": 2, "pp": 2},
    "cp2 ep2": {"world": 2, "cp": 2, "ep": 2},
}


@pytest.fixture(scope="module")
def qwen(tiny: Any) -> Any:
    """Geometry with a balance loss, transformers' numbers for it, and the weights."""
    plain = tiny.qwen3_moe()
    geometry = replace(plain, experts=replace(plain.experts, aux_loss_coeff=0.3))
    return geometry, *tiny.reference_gradients(geometry)


def test_one_process_equals_transformers(tiny: Any) -> None:
    geometry = tiny.qwen3_moe()
    expected, weights = tiny.reference_gradients(geometry)
    found = run_distributed(lambda worker: tiny.measure(geometry, tiny.layout(1), worker, weights), 1)
    assert torch.allclose(found[0].logits, expected.logits, rtol=0, atol=1e-5)  # measured 2e-6
    assert found[0].loss == pytest.approx(expected.loss, rel=1e-6)
    difference, name = tiny.worst(found, expected)
    assert difference < TOLERANCE, name
    assert found[0].balance is None


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_transformers_with_the_balance_loss(name: str, tiny: Any, qwen: Any) -> None:
    geometry, expected, weights = qwen
    where = tiny.layout(**LAYOUTS[name])
    found = run_distributed(lambda worker: tiny.measure(geometry, where, worker, weights, training=True), where.world)
    assert max(rank.loss for rank in found) == pytest.approx(expected.loss, rel=1e-6)
    difference, tensor = tiny.worst(found, expected)
    assert difference < TOLERANCE, tensor
    assert [rank.balance for rank in found] == pytest.approx([expected.balance] * where.world, rel=1e-5)


@pytest.mark.parametrize("name", ["dp2", "tp2 ep2 etp2"])
def test_one_product_for_all_experts_changes_nothing(name: str, tiny: Any, qwen: Any) -> None:
    geometry, expected, weights = qwen
    where = tiny.layout(**LAYOUTS[name])
    recomputed = ParallelConfig(recompute_granularity="full")
    found = run_distributed(
        lambda worker: tiny.measure(
            geometry,
            where,
            worker,
            weights,
            parallel=recomputed,
            moe=ExpertConfig(moe_grouped_gemm=True),
            training=True,
        ),
        where.world,
    )
    assert max(rank.loss for rank in found) == pytest.approx(expected.loss, rel=1e-6)
    difference, tensor = tiny.worst(found, expected)
    assert difference < TOLERANCE, tensor


def test_the_balance_loss_is_in_those_gradients(tiny: Any, qwen: Any) -> None:
    geometry, expected, weights = qwen
    found = run_distributed(lambda worker: tiny.measure(geometry, tiny.layout(1), worker, weights), 1)
    difference, name = tiny.worst(found, expected)
    assert difference > 100 * TOLERANCE, "evaluation mode leaves it out"
    assert "expert" not in name


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(recompute_granularity="full"),
        ParallelConfig(recompute_granularity="selective", recompute_modules=("moe", "layernorm", "core_attn")),
    ],
    ids=["full", "selective"],
)
def test_recomputation_changes_nothing(parallel: ParallelConfig, tiny: Any, qwen: Any) -> None:
    geometry, expected, weights = qwen
    found = run_distributed(
        lambda worker: tiny.measure(geometry, tiny.layout(1), worker, weights, parallel=parallel, training=True), 1
    )
    difference, name = tiny.worst(found, expected)
    assert difference < TOLERANCE, name
    assert found[0].balance == pytest.approx(expected.balance, rel=1e-5)


def test_parameters_of_spread_experts_are_marked(tiny: Any) -> None:
    geometry = tiny.qwen3_moe()
    _, weights = tiny.reference_gradients(geometry)
    where = tiny.layout(2, ep=2)
    first, second = run_distributed(lambda worker: tiny.measure(geometry, where, worker, weights), 2)
    for rank, numbers in ((first, (0, 1, 2)), (second, (3, 4, 5))):
        assert set(rank.expert_names) == {
            f"decoder.layers.{layer}.mlp.experts.local_experts.{number}.{matrix}.weight"
            for layer in (0, 1)
            for number in numbers
            for matrix in ("linear_fc1", "linear_fc2")
        }


def test_bias_and_counts_stay_fp32_in_a_bf16_model(tiny: Any) -> None:
    geometry = tiny.deepseek3()

    def router(worker: Any) -> Any:
        with tiny.chunk_of(geometry, tiny.layout(1), worker) as (_, chunk):
            bias = dict(chunk.named_buffers())["decoder.layers.1.mlp.router.expert_bias"]
            bias.fill_(1.0 + 2**-12)
            chunk.bfloat16()
            one = chunk.decoder.layers[1].mlp.router
            frozen = [one.frozen_expert_bias]
            one.weight.requires_grad_(False)
            return one.expert_bias, one.local_tokens_per_expert, one.weight.dtype, [*frozen, one.frozen_expert_bias]

    bias, counts, matrix, frozen = run_distributed(router, 1)[0]
    assert bias.tolist() == [1.0 + 2**-12] * 8
    assert counts.dtype == torch.float32
    assert matrix == torch.bfloat16
    assert frozen == [False, True], "a router that does not train keeps its bias too"
