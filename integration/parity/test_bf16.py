"""bf16: activations and weights in bf16, main parameters in fp32, close to the fp32 run in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity_run as run
import pytest
import torch
from parity_run import PP2, TP2_SP, ZERO1

LAYOUTS = {"one": ([], 1), "tp2-sp": (TP2_SP, 2), "pp2": (PP2, 2), "zero1": (ZERO1, 2)}
FLAGS = ["--lr", "1e-3", "--min-lr", "1e-3", "--clip-grad", "1.0"]
LOSS, NORM = 2e-3, 1e-2
"""Relative to fp32. Measured worst over layouts and steps: loss 4.5e-4, norm 1.8e-3."""


def main_types(part: Any, training: Any) -> tuple[set[str], set[str]]:
    """Types of the model's parameters and of those the optimizer updates."""
    from loongforge.core.step.optimizer import inner_optimizers

    model = {str(parameter.dtype) for chunk in training.chunks for parameter in chunk.parameters()}
    inner = inner_optimizers(training.optimizer)
    main = {str(p.dtype) for one in inner for group in one.param_groups for p in group["params"]}
    main |= {str(t.dtype) for one in inner for state in one.state.values() for t in state.values() if t.dim()}
    return model, main


def batches() -> list[list[run.Batch]]:
    return [[run.random_batch(1, 32, 4 * step + row) for row in range(4)] for step in range(3)]


@pytest.fixture(scope="module")
def fp32(megatron: Any, qwen3_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> run.Result:
    return run.steps(run.config_of(qwen3_untied, FLAGS), 1, batches(), tmp_path_factory.mktemp("fp32"), main_types)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_close_to_fp32(layout: str, megatron: Any, qwen3_untied: Path, fp32: run.Result, tmp_path: Path) -> None:
    flags, world = LAYOUTS[layout]
    found = run.steps(
        run.config_of(qwen3_untied, [*flags, *FLAGS], precision="bf16"), world, batches(), tmp_path, main_types
    )
    assert fp32.extra == [({"torch.float32"}, {"torch.float32"})]
    assert found.extra == [({"torch.bfloat16"}, {"torch.float32"})] * world
    print("distance", [a / b - 1 for a, b in zip(found.losses + found.norms, fp32.losses + fp32.norms, strict=True)])
    assert found.losses == pytest.approx(fp32.losses, rel=LOSS)
    assert found.norms == pytest.approx(fp32.norms, rel=NORM)
    assert found.losses != fp32.losses, "bf16 was not used"
    for name, tensor in fp32.tensors.items():
        # Three Adam steps of 1e-3 move an entry by at most about 3e-3; rounding to bf16 by 2^-9 of its size.
        limit = 6e-3 + tensor.abs() * 2**-8
        assert ((found.tensors[name] - tensor).abs() <= limit).all(), name
    assert all(torch.isfinite(tensor).all() for tensor in found.tensors.values())
