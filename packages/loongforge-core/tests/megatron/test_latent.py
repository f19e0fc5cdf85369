"""Latent attention with group-limited experts equals transformers, in one process and in every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loongforge.core.testing import run_distributed

TOLERANCE = 2e-5
"""Relative, fp32. Measured: below 3e-6 in every case here. A wrong gradient is off by 1e-2 and more."""

LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"world": 2, "tp": 2},
    "tp2 ep2": {"world": 4, "tp": 2, "ep": 2},
    "pp2": {"world": 2, "pp": 2},
    "cp2": {"world": 2, "cp": 2},
}


@pytest.fixture(scope="module")
def deepseek(tiny: Any) -> Any:
    """Geometry, transformers' numbers for it, and the weights."""
    geometry = tiny.deepseek3()
    return geometry, *tiny.reference_gradients(geometry)


@pytest.mark.parametrize(
    ("rank", "stretched"), [(18, True), (18, False), (None, True)], ids=["yarn", "plain", "no query rank"]
)
def test_one_process_equals_transformers(rank: int | None, stretched: bool, tiny: Any) -> None:
    geometry = tiny.deepseek3(rank, stretched=stretched)
    expected, weights = tiny.reference_gradients(geometry)
    found = run_distributed(lambda worker: tiny.measure(geometry, tiny.layout(1), worker, weights), 1)
    assert torch.allclose(found[0].logits, expected.logits, rtol=0, atol=1e-5)  # measured 3e-6
    assert found[0].loss == pytest.approx(expected.loss, rel=1e-6)
    difference, name = tiny.worst(found, expected)
    assert difference < TOLERANCE, name


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_transformers(name: str, packed: bool, tiny: Any, deepseek: Any) -> None:
    geometry, expected, weights = deepseek
    where = tiny.layout(**LAYOUTS[name])
    found = run_distributed(lambda worker: tiny.measure(geometry, where, worker, weights, packed=packed), where.world)
    assert max(rank.loss for rank in found) == pytest.approx(expected.loss, rel=1e-6)
    difference, tensor = tiny.worst(found, expected)
    assert difference < TOLERANCE, tensor


def test_tensor_parallel_ranks_must_split_the_sequence(tiny: Any) -> None:
    where = replace(tiny.layout(2, tp=2), sp=False)

    def build(worker: Any) -> None:
        with tiny.chunk_of(tiny.deepseek3(), where, worker):
            pass

    with pytest.raises(AssertionError, match="needs sequence parallelism"):
        run_distributed(build, 2)


@pytest.mark.parametrize("where", [{"world": 1}, {"world": 2}, {"world": 2, "tp": 2}], ids=["one", "dp2", "tp2"])
def test_the_bias_moves_towards_idle_experts_alike_in_every_layout(
    where: dict[str, int], tiny: Any, deepseek: Any
) -> None:
    geometry, _, weights = deepseek
    layout = tiny.layout(**where)
    found = run_distributed(lambda worker: tiny.measure(geometry, layout, worker, weights, training=True), layout.world)
    (name,) = found[0].buffers
    moves = [(rank.buffers[name] - weights[name]) * 1000 for rank in found]
    assert all(torch.equal(moves[0], one) for one in moves)
    # The reference: choices of transformers' router over the whole batch.
    counts = tiny.choices(geometry)
    expected = torch.sign(counts.mean() - counts)
    assert expected.abs().sum() > 0
    assert torch.allclose(moves[0], expected, atol=1e-3), "fp32 steps of 0.001 on numbers near 0.1"
