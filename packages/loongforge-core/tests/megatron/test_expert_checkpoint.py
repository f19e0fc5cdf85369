"""Weights of experts and latent attention saved on one layout load on another."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from loongforge.core.testing import run_distributed

SPREAD = {
    "tp2 ep2": {"world": 4, "tp": 2, "ep": 2},
    "tp2 etp2": {"world": 2, "tp": 2, "etp": 2},
    "pp2 ep2": {"world": 4, "pp": 2, "ep": 2},
}


@pytest.mark.parametrize("name", SPREAD)
def test_saved_spread_loaded_whole(name: str, tiny: Any, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    from loongforge.core.checkpoint.write import plan_write

    geometry = tiny.deepseek3()
    _, weights = tiny.reference_gradients(geometry)
    where = tiny.layout(**SPREAD[name])

    def save(worker: Any) -> None:
        with tiny.chunk_of(geometry, where, worker) as (world, chunk):
            tiny.load(chunk, world, weights)
            planned = plan_write(chunk.sharded_state_dict(), tmp_path)
            results = world.gather(planned.write())
            if world.is_main:
                planned.close(tmp_path, results)

    def load(worker: Any) -> dict[str, torch.Tensor]:
        with tiny.chunk_of(geometry, tiny.layout(1), worker) as (_, chunk):
            with warnings.catch_warnings():  # about megatron-core's own calls into torch
                warnings.simplefilter("ignore")
                loaded = dist_checkpointing.load(chunk.sharded_state_dict(), str(tmp_path))
            chunk.load_state_dict(loaded)
            found = {name: one.detach().clone() for name, one in tiny.whole_model_names([chunk]).items()}
            return found | tiny.expert_biases(chunk)

    run_distributed(save, where.world)
    (found,) = run_distributed(load, 1)
    assert found.keys() == weights.keys()
    assert [name for name, one in found.items() if not torch.equal(one, weights[name])] == []
