"""The loss that teaches an indexer which keys to choose, against its equations on transformers' model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from case import LAYOUTS
from cases import CASES
from safetensors.torch import load_file, save_file

from loongforge.core.testing import run_distributed

COEFFICIENT = 0.7
TOLERANCE = 2e-5
"""Relative, fp32. Measured: below 3e-6. A loss left out leaves gradients of 0, one weighed wrong is off by 0.1."""


UNEVEN = ("--decoder-first-pipeline-num-layers", "3")
"""So that no stage begins with a layer that shares; two micro-batches are in flight on the first one."""
LAYERS = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
ATTENTION = ("--recompute-granularity", "selective", "--recompute-modules", "core_attn")


@pytest.mark.parametrize(
    ("name", "layout", "flags"),
    [
        ("deepseek_v32", "tp2-sp-pp2", ()),
        ("deepseek_v32", "cp2", ()),
        ("glm_moe_dsa", "pp2", (*UNEVEN, *LAYERS)),
        ("glm_moe_dsa", "pp2", (*UNEVEN, *ATTENTION)),
    ],
    ids=["deepseek tp2-sp-pp2", "deepseek cp2", "glm layers recomputed", "glm attention recomputed"],
)
def test_the_indexer_learns_what_attention_looks_at(
    name: str, layout: str, flags: tuple[str, ...], zoo: Any, tmp_path: Path
) -> None:
    """And a layer without one sees, recomputed too, what the layer before it chose in the same micro-batch."""
    from proof import GRADIENTS, SEQUENCES, config_of, one_step, read

    from loongforge.ckpt.verify.batch import make_batch
    from loongforge.ckpt.verify.difference import Side, differences

    case, directory = CASES[name], zoo.checkpoint(name)
    still = ("--clip-grad", "0", "--lr", "0", "--min-lr", "0")
    config = config_of(case, directory, layout, "--dsa-indexer-loss-coeff", str(COEFFICIENT), *still, *flags)
    batch = make_batch(config, SEQUENCES)
    batch["loss_mask"][1, 3:20] = 0  # tokens that teach the indexer all the same
    save_file(batch, tmp_path / "batch.safetensors")
    expected = zoo.reference.taught(
        name, directory, tmp_path / "batch.safetensors", tmp_path / "reference.safetensors", COEFFICIENT
    )
    work = partial(one_step, config=config, batch=batch, scratch=tmp_path)
    found = run_distributed(work, LAYOUTS[layout][1])[0]
    gradients = load_file(tmp_path / "reference.safetensors")
    taught = [name for name in gradients if ".indexer." in name]
    layers = case.config["num_hidden_layers"]
    assert len(taught) == 5 * case.config.get("indexer_types", ["full"] * layers).count("full")
    assert all(gradients[name].abs().max() > 0 for name in taught)
    no_logits = torch.zeros(1)
    apart = differences(
        Side(loss=found.loss, logits=no_logits, gradients=read(tmp_path / GRADIENTS)),
        Side(loss=expected["loss"], logits=no_logits, gradients=gradients),
    )
    assert apart[0].worst < TOLERANCE, apart[:5]
