"""Packed rows: each segment must train exactly as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity_run as run
import pytest
import torch
from parity_run import LAYOUTS, Batch

from loongforge.core.testing import fp32_tolerance

SEGMENTS = ((8, 12, 4, 8), (20, 4, 8))
"""Lengths in two rows of 32, all multiples of 2 x cp."""
PADDING = {(0, 1): 3, (1, 0): 5}
"""(row, segment) -> padded tokens at its end, loss_mask 0."""

TOLERANCE = fp32_tolerance(2e-5)
"""Relative, fp32. Measured worst: 3e-6. A token that sees its neighbour segment moves gradients by more than 1e-1."""


def segments() -> list[list[Batch]]:
    """One `[1, length]` batch for every segment of every row."""
    rows = []
    for row, lengths in enumerate(SEGMENTS):
        parts = []
        for number, length in enumerate(lengths):
            part = run.random_batch(1, length, seed=10 * row + number, keep=0.9)
            if padded := PADDING.get((row, number)):
                part["loss_mask"][:, -padded:] = 0
            parts.append(part)
        rows.append(parts)
    return rows


def packed(rows: list[list[Batch]]) -> Batch:
    """The micro-batch as the loader hands it out: one long row with the segments' ends."""
    parts = [part for row in rows for part in row]
    names = ("tokens", "labels", "loss_mask", "position_ids")
    batch: Batch = {name: torch.cat([part[name] for part in parts], dim=1) for name in names}
    lengths = torch.tensor([0] + [part["tokens"].size(1) for part in parts])
    batch["cu_seqlens"] = lengths.cumsum(0).to(torch.int32)
    batch["sample_ids"] = torch.arange(len(rows))
    return batch


@pytest.fixture(scope="module")
def alone(qwen3_untied: Path) -> run.Result:
    """transformers on every segment by itself."""
    return run.transformers_alone(qwen3_untied, [part for row in segments() for part in row])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batch_of_two_packed_rows(
    layout: str, megatron: Any, qwen3_untied: Path, alone: run.Result, tmp_path: Path
) -> None:
    flags, world = LAYOUTS[layout]
    config = run.config_of(qwen3_untied, flags, mbs=2, gbs=2)
    found = run.gradients(config, world, [packed(segments())], tmp_path)
    assert found.loss_tokens == alone.loss_tokens
    assert found.losses == pytest.approx(alone.losses, rel=fp32_tolerance(1e-6))
    assert run.worst(found.tensors, alone.tensors) < (TOLERANCE, "")


@pytest.mark.parametrize("layout", ["one", "tp2-sp", "cp2"])
def test_two_micro_batches_of_one_packed_row(
    layout: str, megatron: Any, qwen3_untied: Path, alone: run.Result, tmp_path: Path
) -> None:
    flags, world = LAYOUTS[layout]
    config = run.config_of(qwen3_untied, flags, mbs=1, gbs=2)
    found = run.gradients(config, world, [packed([row]) for row in segments()], tmp_path)
    assert found.losses == pytest.approx(alone.losses, rel=fp32_tolerance(1e-6))
    assert run.worst(found.tensors, alone.tensors) < (TOLERANCE, "")


@pytest.mark.parametrize("layout", ["one", "tp2-sp", "cp2"])
def test_no_token_reaches_another_segment(layout: str, megatron: Any, qwen3_untied: Path, tmp_path: Path) -> None:
    """Only segment 1 counts; other tokens in the segments around it change nothing, other tokens in it do."""
    flags, world = LAYOUTS[layout]
    config = run.config_of(qwen3_untied, flags, gbs=1)
    parts = segments()[0]
    for number, part in enumerate(parts):
        part["loss_mask"][:] = float(number == 1)
    before = run.gradients(config, world, [packed([parts])], tmp_path / "before")
    for number, part in enumerate(parts):
        if number != 1:
            part["tokens"] = (part["tokens"] + 7) % run.VOCABULARY
    around = run.gradients(config, world, [packed([parts])], tmp_path / "around")
    parts[1]["tokens"][0, 0] = (parts[1]["tokens"][0, 0] + 7) % run.VOCABULARY
    inside = run.gradients(config, world, [packed([parts])], tmp_path / "inside")
    assert around.losses == before.losses
    assert run.worst(around.tensors, before.tensors)[0] == 0.0
    assert abs(inside.losses[0] - before.losses[0]) > 1e-4
