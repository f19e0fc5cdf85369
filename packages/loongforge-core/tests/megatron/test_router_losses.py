"""Every loss of the routers, and dropping, equal their definitions on transformers' logits: loss and each gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loongforge.core.config.experts import ExpertConfig
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
