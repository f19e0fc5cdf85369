"""Models with random adapters against PEFT and torch: logits, loss, the gradient of every A and B, in many layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lora_cases import LORA, RUNS

PAIRS = [(name, layout) for name, case in LORA.items() for layout in case.layouts]
TOLERANCE = 2e-5
"""Relative to a tensor's largest entry, as in the zoo."""


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_logits_loss_and_every_gradient(name: str, layout: str, shelf: Any, tmp_path: Path) -> None:
    from lora_run import config_of, measure

    from loongforge.ckpt.verify.difference import differences

    case, expected = LORA[name], shelf.expected(name)
    config = config_of(case, shelf.base(case.zoo), layout, "--lora-adapter-path", str(shelf.adapter(name)))
    found = differences(measure(config, RUNS[layout][1], tmp_path), expected)
    assert len(expected.gradients) > 10
    assert found[0].worst < TOLERANCE, found[:5]
    print(name, layout, found[0])
