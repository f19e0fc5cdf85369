"""Encoder and projector equal transformers' vision towers: features of every level and every gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from tiny_towers import GRID, differences, import_heavy

from loongforge.core.testing import run_distributed

TOLERANCE = 2e-5
"""Measured: at most 3e-6 of the largest value, in fp32, over all cases below; the rest is room for other machines."""

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute_granularity": "full"},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    "selective": {"recompute_granularity": "selective"},
}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["qwen3_vit", "qwen2_5_vit"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_equals_transformers(name: str, tp: int, recompute: str) -> None:
    import_heavy()
    work = partial(differences, name=name, tp=tp, grid=GRID, **RECOMPUTE[recompute])
    for found in run_distributed(work, tp):
        assert max(found.values()) < TOLERANCE, sorted(found.items(), key=lambda pair: -pair[1])[:5]
