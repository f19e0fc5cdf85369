"""Ten optimizer steps of every case in one layout of two ranks, against torch's AdamW on the reference."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from case import LAYOUTS
from cases import CASES
from reference import CLIP, DECAY, LEARNING_RATE
from safetensors.torch import load_file, save_file

STEPS = 10
OPTIMIZER = (
    *("--lr", str(LEARNING_RATE), "--min-lr", str(LEARNING_RATE), "--weight-decay", str(DECAY)),
    *("--clip-grad", str(CLIP), "--adam-beta2", "0.95"),
)


@pytest.mark.parametrize("name", CASES)
def test_ten_steps(name: str, zoo: Any, results: dict[str, Any], tmp_path: Path) -> None:
    from proof import SEQUENCES, WEIGHTS, config_of, read, train, two_ranks

    from loongforge.ckpt.verify.batch import make_batch
    from loongforge.core.testing import run_distributed

    layout, directory = two_ranks(CASES[name]), zoo.checkpoint(name)
    config = config_of(CASES[name], directory, layout, *OPTIMIZER)
    batches = [make_batch(replace(config, train=replace(config.train, seed=seed)), SEQUENCES) for seed in range(STEPS)]
    paths = [tmp_path / f"{number}.safetensors" for number in range(STEPS)]
    for path, batch in zip(paths, batches, strict=True):
        save_file(batch, path)
    expected = zoo.reference.steps(name, directory, paths, tmp_path / "reference.safetensors")
    seen = run_distributed(partial(train, config=config, batches=batches, scratch=tmp_path), LAYOUTS[layout][1])[0]
    found, weights = read(tmp_path / WEIGHTS), load_file(tmp_path / "reference.safetensors")
    assert found.keys() == weights.keys()
    apart = {
        key: (found[key] - tensor).abs()
        for key, tensor in weights.items()
        if not re.fullmatch(CASES[name].rounding, key)
    }
    assert apart
    results.setdefault(name, {})["steps"] = {
        "layout": layout,
        "loss": max(abs(loss - other) for (loss, _), other in zip(seen, expected["losses"], strict=True)),
        "weight": max(float(one.max()) for one in apart.values()),
        "mean": max(float(one.mean()) for one in apart.values()),
    }
    # Adam divides by the gradient's own size, so rounding grows where a gradient is near epsilon or changes its sign.
    for ours, theirs, bound in zip(zip(*seen, strict=True), expected.values(), (1e-4, 1e-3), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=bound, atol=0)
    for key, one in apart.items():
        # An entry goes at most about 10 steps x 1e-3 = 1e-2; a hundredth of that is 1e-4, a thousandth 1e-5.
        assert one.mean() < 1e-5, (key, one.mean())
        assert (one > 1e-4).float().mean() < 1e-2, (key, one.max())
