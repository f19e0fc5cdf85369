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

NAME, COEFFICIENT = "deepseek_v32", 0.7
TOLERANCE = 2e-5
"""Relative, fp32. Measured: below 3e-6. A loss left out leaves gradients of 0, one weighed wrong is off by 0.1."""


@pytest.mark.parametrize("layout", ["tp2-sp-pp2", "cp2"])
def test_the_indexer_learns_what_attention_looks_at(layout: str, zoo: Any, tmp_path: Path) -> None:
    from proof import GRADIENTS, SEQUENCES, config_of, one_step, read

    from loongforge.ckpt.verify.batch import make_batch
    from loongforge.ckpt.verify.difference import Side, differences

    directory = zoo.checkpoint(NAME)
    still = ("--clip-grad", "0", "--lr", "0", "--min-lr", "0")
    config = config_of(CASES[NAME], directory, layout, "--dsa-indexer-loss-coeff", str(COEFFICIENT), *still)
    batch = make_batch(config, SEQUENCES)
    batch["loss_mask"][1, 3:20] = 0  # tokens that teach the indexer all the same
    save_file(batch, tmp_path / "batch.safetensors")
    expected = zoo.reference.taught(
        NAME, directory, tmp_path / "batch.safetensors", tmp_path / "reference.safetensors", COEFFICIENT
    )
    work = partial(one_step, config=config, batch=batch, scratch=tmp_path)
    found = run_distributed(work, LAYOUTS[layout][1])[0]
    gradients = load_file(tmp_path / "reference.safetensors")
    taught = [name for name in gradients if ".indexer." in name]
    assert len(taught) == 5 * CASES[NAME].config["num_hidden_layers"]
    assert all(gradients[name].abs().max() > 0 for name in taught)
    no_logits = torch.zeros(1)
    apart = differences(
        Side(loss=found.loss, logits=no_logits, gradients=read(tmp_path / GRADIENTS)),
        Side(loss=expected["loss"], logits=no_logits, gradients=gradients),
    )
    assert apart[0].worst < TOLERANCE, apart[:5]
    layers = [found.detail[f"indexer_loss/layer_{layer}"] for layer in range(CASES[NAME].config["num_hidden_layers"])]
    assert sum(layers) == pytest.approx(expected["indexers"], rel=1e-5)
    assert found.extra["indexer_loss"] == pytest.approx(sum(layers) / len(layers))
