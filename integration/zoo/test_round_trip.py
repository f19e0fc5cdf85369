"""From the Hugging Face directory into every layout and back: the same names, shapes, types, bytes and config.json."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from case import LAYOUTS
from cases import CASES

PAIRS = [(name, layout) for name, case in CASES.items() for layout in case.layouts]


def check_equal(written: Path, source: Path) -> None:
    from proof import read

    found, expected = read(written), read(source)
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:5]
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert json.loads((written / "config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_bit_for_bit(name: str, layout: str, zoo: Any, results: dict[str, Any]) -> None:
    from proof import ROUND

    check_equal(zoo.run(name, layout) / ROUND, zoo.checkpoint(name))
    results.setdefault(name, {}).setdefault("round_trip", []).append(layout)


@pytest.mark.parametrize("name", CASES)
def test_bit_for_bit_in_bf16(name: str, zoo: Any, results: dict[str, Any], tmp_path: Path) -> None:
    from proof import ROUND, config_of, pass_through, two_ranks

    from loongforge.core.testing import run_distributed

    layout = two_ranks(CASES[name])
    config = config_of(CASES[name], zoo.halved(name), layout, precision="bf16")
    run_distributed(partial(pass_through, config=config, scratch=tmp_path), LAYOUTS[layout][1])
    check_equal(tmp_path / ROUND, zoo.halved(name))
    results.setdefault(name, {})["bf16"] = layout
