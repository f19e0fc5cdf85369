"""Hugging Face weights through the trainer at a learning rate of 0 and back: every tensor bit for bit, each layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity_run as run
import pytest
from parity_run import CP2, PP2, TP2_SP, ZERO1

VPP2 = [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]
LAYOUTS = {
    "one": ([], 1), "tp2": (TP2_SP[:2], 2), "tp2-sp": (TP2_SP, 2), "pp2": (PP2, 2), "vpp2": (VPP2, 2), "cp2": (CP2, 2),
    "zero1": (ZERO1, 2), "tp2-pp2": ([*TP2_SP, *PP2], 4),
}  # fmt: skip
RATE_0 = ["--lr", "0", "--min-lr", "0", "--weight-decay", "0.1"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_at_rate_0_change_nothing(
    layout: str, tied: bool, megatron: Any, qwen3_untied: Path, qwen3_tied: Path, tmp_path: Path
) -> None:
    flags, world = LAYOUTS[layout]
    directory = qwen3_tied if tied else qwen3_untied
    batches = [[run.random_batch(1, 32, 4 * step + row) for row in range(4)] for step in range(2)]
    found = run.steps(run.config_of(directory, [*flags, *RATE_0]), world, batches, tmp_path)
    before = run.read(directory)
    assert found.norms[0] > 0, "gradients there were"
    assert found.tensors.keys() == before.keys()
    assert run.worst(found.tensors, before)[0] == 0.0
