"""Losses of the routers and loads of the experts of every family, from transformers' router logits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from case import LAYOUTS
from cases import CASES
from safetensors.torch import load_file, save_file

from loongforge.core.testing import fp32_tolerance, run_distributed

FAMILIES = {
    # How choices are scored, and whether those that were made count or those of the best scores.
    "qwen3_moe": ("softmax", False),
    "qwen3_next": ("softmax", False),
    "deepseek_v2": ("softmax", True),
    "deepseek_v2_lite": ("softmax", True),
    "deepseek_v3": ("sigmoid", False),
    "glm_4_5": ("sigmoid", False),
    "minimax_m2": ("sigmoid", False),
}
TERMS = [
    (name, layout, kind)
    for name in FAMILIES
    for layout, kind in (("one", "global_aux_loss"), ("tp2-sp-ep2", "seq_aux_loss"), ("ep2", "aux_loss"))
    if layout in CASES[name].layouts
] + [("qwen3_moe", "pp2-vpp2", "global_aux_loss"), ("glm_4_5", "ep2", "none")]
BALANCE, Z_LOSS = 0.3, 0.02
TOLERANCE = fp32_tolerance(5e-5)
"""Relative, fp32. Measured: 2.02e-5 in a decay of qwen3_next, a sum of terms that cancel, below 1e-5 elsewhere; a loss
left out or weighed by the wrong count of tokens is off by 1e-2 and more."""


@pytest.mark.parametrize(("name", "layout", "kind"), TERMS)
def test_router_losses_and_loads(
    name: str, layout: str, kind: str, zoo: Any, results: dict[str, Any], tmp_path: Path
) -> None:
    from proof import GRADIENTS, SEQUENCES, config_of, one_step, read

    from loongforge.ckpt.verify.batch import make_batch
    from loongforge.ckpt.verify.difference import Side, differences

    directory, (score, made) = zoo.checkpoint(name), FAMILIES[name]
    flags = ("--moe-router-load-balancing-type", kind, "--moe-aux-loss-coeff", str(BALANCE))
    still = ("--moe-z-loss-coeff", str(Z_LOSS), "--clip-grad", "0", "--lr", "0", "--min-lr", "0")
    config = config_of(CASES[name], directory, layout, *flags, *still)
    batch = make_batch(config, SEQUENCES)
    batch["loss_mask"][1, 3:20] = 0
    batch["loss_mask"][2, :9] = 0
    save_file(batch, tmp_path / "batch.safetensors")
    expected = zoo.reference.routed(
        name, directory, tmp_path / "batch.safetensors", tmp_path / "reference.safetensors",
        kind=kind, balance=0.0 if kind == "none" else BALANCE, z_loss=Z_LOSS, score=score, made=made,
    )  # fmt: skip
    work = partial(one_step, config=config, batch=batch, scratch=tmp_path)
    found = run_distributed(work, LAYOUTS[layout][1])[0]
    no_logits = torch.zeros(1)
    apart = differences(
        Side(loss=found.loss, logits=no_logits, gradients=read(tmp_path / GRADIENTS)),
        Side(loss=expected["loss"], logits=no_logits, gradients=load_file(tmp_path / "reference.safetensors")),
    )
    results.setdefault(name, {}).setdefault("routers", {})[layout] = {"worst": apart[0].worst, "where": apart[0].name}
    assert apart[0].worst < TOLERANCE, apart[:5]
    balance = (
        {} if kind == "none" else {"load_balancing_loss": pytest.approx(expected["balance"], rel=fp32_tolerance(1e-5))}
    )
    busiest = pytest.approx(max(load["max"] for load in expected["loads"]))
    assert found.extra == {**balance, "expert_load": busiest}
    assert found.detail["router_z_loss"] == pytest.approx(expected["z_loss"], rel=fp32_tolerance(1e-5))
    dense = CASES[name].config.get("first_k_dense_replace", 0)
    loads = {
        f"expert_load/{what}/layer_{dense + number}": pytest.approx(value)
        for number, load in enumerate(expected["loads"])
        for what, value in load.items()
    }
    assert {key: value for key, value in found.detail.items() if key != "router_z_loss"} == loads
