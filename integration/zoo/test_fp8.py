"""Checkpoints stored in fp8 with a scale for each block load as the numbers they stand for, in every layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from case import LAYOUTS
from cases import CASES
from safetensors.torch import load_file, save_file

from loongforge.core.errors import CheckpointError
from loongforge.core.testing import fp32_tolerance

BLOCK = (20, 12)
"""Divides no size of these models: ranks' parts begin and end inside blocks, and the last blocks are cut."""
WHOLE = (16, 8)
"""Divides all sizes of Qwen3 here: transformers reads no other blocks."""


@pytest.fixture(scope="module")
def stored(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`stored(name, block)`: the fp8 checkpoint, the same numbers in fp32, and how many tensors are fp8."""
    from fp8 import quantise

    made: dict[Any, Any] = {}

    def make(name: str, block: tuple[int, int] = BLOCK) -> tuple[Path, Path, int]:
        if (name, block) not in made:
            folder = tmp_path_factory.mktemp(name)
            paths = folder / "fp8", folder / "numbers"
            made[name, block] = (*paths, quantise(zoo.checkpoint(name), *paths, block))
        return made[name, block]

    return make


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("deepseek_v3", "one"),
        ("deepseek_v3", "tp2-sp-ep2"),
        ("deepseek_v3 predicting", "ep2"),
        ("qwen3", "tp2"),
        ("qwen3_next", "tp2-sp"),
        ("glm_4_5", "ep2"),
    ],
)
def test_loads_what_the_blocks_stand_for(name: str, layout: str, stored: Any, tmp_path: Path) -> None:
    from proof import ROUND, config_of, pass_through
    from test_round_trip import check_equal

    from loongforge.core.testing import run_distributed

    directory, numbers, count = stored(name)
    assert count > 10
    run_distributed(
        partial(pass_through, config=config_of(CASES[name], directory, layout), scratch=tmp_path), LAYOUTS[layout][1]
    )
    check_equal(tmp_path / ROUND, numbers)


def test_transformers_reads_the_same(stored: Any, tmp_path: Path) -> None:
    """Logits, loss and every gradient of `loongforge verify`, whose other side reads the fp8 files by itself."""
    from proof import config_of, prove

    from loongforge.ckpt.verify.batch import make_batch
    from loongforge.ckpt.verify.difference import differences, ours, theirs
    from loongforge.ckpt.verify.reference import BATCH, run_reference
    from loongforge.core.plan import Plan
    from loongforge.core.testing import run_distributed

    directory, _, _ = stored("qwen3", WHOLE)
    plan = Plan.of(config_of(CASES["qwen3"], directory, "tp2"), 2)
    save_file(make_batch(plan.config, 4), tmp_path / BATCH)
    run_reference(directory, tmp_path)
    run_distributed(partial(prove, config=plan.config, scratch=tmp_path), 2)
    found = differences(ours(plan, tmp_path), theirs(tmp_path))
    assert found[0].worst < fp32_tolerance(CASES["qwen3"].tolerance), found[:5]


DAMAGES: dict[str, Any] = {
    "are absent": lambda tensors, name: tensors.pop(name + "_scale_inv"),
    "floating numbers": lambda tensors, name: tensors.update({name + "_scale_inv": torch.ones(2, 2)}),
    "F8_E5M2": lambda tensors, name: tensors.update({name: tensors[name].float().to(torch.float8_e5m2)}),
}


@pytest.mark.parametrize("text", DAMAGES)
def test_damage_is_named(text: str, stored: Any, tmp_path: Path, megatron: Any) -> None:
    from proof import config_of, pass_through

    from loongforge.core.testing import run_distributed

    directory, _, _ = stored("qwen3")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    DAMAGES[text](tensors, name)
    bad = tmp_path / "bad"
    bad.mkdir()
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    (bad / "config.json").write_bytes((directory / "config.json").read_bytes())
    config = config_of(CASES["qwen3"], bad, "one")
    with pytest.raises(AssertionError, match=f"{CheckpointError.__name__}: .*{name}.*{text}"):
        run_distributed(partial(pass_through, config=config, scratch=tmp_path), 1)
