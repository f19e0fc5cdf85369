"""Packed rows with images: every segment trains as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import omni_run as run
import pytest
import torch

LENGTHS = ((40, 48), (28, 44))
"""Of the sequences in two rows, all multiples of 2 x cp; what is left of a row is a segment of padding."""
ROW = 96
MIX = "packed"

TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "+model.image_encoder.tensor-model-parallel-size=1"]
CP2 = ["--context-parallel-size", "2"]
AHEAD = ["--enable-full-hetero-dp"]
LAYOUTS: dict[str, tuple[list[str], int]] = {
    "one": ([], 1),
    "tp2, encoder tp1": (TP2, 2),
    "cp2": (CP2, 2),
    "cp2, ahead": (CP2 + AHEAD, 2),
    "pp2, ahead": (["--pipeline-model-parallel-size", "2", *AHEAD], 2),
}

TOLERANCE = 1e-5
"""Relative to a tensor's largest entry, fp32; measured worst 2.3e-6."""


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """A mix of four sequences of which only the first tokens count, so that the rest can be left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.MIXES, MIX, run.MIXES["mixed"])
        for one, length in zip(run.sequences(MIX), sum(LENGTHS, ()), strict=True):
            assert not one.kinds[:, length:].any(), "all images stand in the part that is kept"
            one.loss_mask[:, length:] = 0.0
        yield
    run.sequences.cache_clear()


@pytest.fixture(scope="module")
def alone(megatron: Any, vlm: dict[str, Path]) -> Any:
    """transformers on every sequence by itself, by family, once."""
    kept: dict[str, run.Measured] = {}

    def of(family: str) -> run.Measured:
        if family not in kept:
            kept[family] = run.transformers_alone(vlm[family], MIX)
        return kept[family]

    return of


def rows() -> list[list[run.Sequence_]]:
    """The sequences of each row, cut to their lengths, and a segment that fills it up."""
    every = iter(run.sequences(MIX))
    made: list[list[run.Sequence_]] = []
    for lengths in LENGTHS:
        parts = [cut(next(every), length) for length in lengths]
        rest = cut(run.sequence([], 0), ROW - sum(lengths))
        made.append([*parts, replace(rest, loss_mask=torch.zeros_like(rest.loss_mask))])
    return made


def cut(one: run.Sequence_, length: int) -> run.Sequence_:
    """The first tokens of a sequence."""
    fields = {name: getattr(one, name)[:, :length] for name in ("tokens", "labels", "loss_mask", "kinds")}
    return replace(one, **fields)


def packed(some: list[list[run.Sequence_]], first: int, rank: int) -> dict[str, Any]:
    """A micro-batch of packed rows as the loader hands it out."""
    parts = [part for row in some for part in row]
    lengths = [part.tokens.size(1) for part in parts]
    kinds = torch.cat([part.kinds for part in parts], 1)
    positions = [run.position_ids(whole(part), rank)[..., : part.tokens.size(1)] for part in parts]
    ids = torch.cat(positions, -1)
    made: dict[str, Any] = {
        "tokens": torch.cat([part.tokens for part in parts], 1),
        "labels": torch.cat([part.labels for part in parts], 1),
        "loss_mask": torch.cat([part.loss_mask for part in parts], 1),
        "position_ids": ids[0] if rank == 1 else ids,
        "sample_ids": torch.arange(first, first + len(some)),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_seqlen": max(lengths),
        "grid": torch.tensor([grid for part in parts for _, grid in part.items], dtype=torch.int64).view(-1, 3),
        "visual_positions": torch.nonzero(kinds[0])[:, 0],
        "items_of": torch.tensor([sum(len(part.items) for part in row) for row in some]),
    }
    if pixels := [patches for part in parts for patches in part.pixels]:
        made["pixels"] = torch.cat(pixels)
    return made


def whole(part: run.Sequence_) -> run.Sequence_:
    """The sequence with text after its end, as long as all others."""
    missing = run.LENGTH - part.kinds.size(1)
    return replace(part, kinds=torch.nn.functional.pad(part.kinds, (0, missing)))


def batches(part: Any, mix: str, given: list[list[run.Sequence_]]) -> list[dict[str, Any]]:
    """Packed micro-batches of this rank's foundation replica, in place of `omni_run.my_batches`."""
    plan, world = part.plan, part.world
    size = plan.micro_batch_size
    rank = plan.geometry.position_rank
    groups = [packed(given[first : first + size], first, rank) for first in range(0, len(given), size)]
    return groups[world.dp.rank() :: world.dp.size()]


def gradients(
    load: Path, layout: str, given: list[list[run.Sequence_]], out: Path, monkeypatch: pytest.MonkeyPatch, mbs: int = 1
) -> run.Measured:
    flags, world = LAYOUTS[layout]
    config = run.config_of(load, [*flags, f"train.seq_length={ROW}"], mbs=mbs, gbs=2)
    monkeypatch.setattr(run, "my_batches", partial(batches, given=given))
    return run.gradients(config, world, MIX, out)


@pytest.mark.parametrize(
    ("layout", "mbs"),
    [("one", 1), ("one", 2), ("tp2, encoder tp1", 2), ("cp2", 1), ("cp2, ahead", 2), ("pp2, ahead", 1)],
)
def test_segments_equal_sequences_alone(
    layout: str, mbs: int, vlm: dict[str, Path], alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check("qwen3_vl", layout, mbs, vlm, alone, tmp_path, monkeypatch)


@pytest.mark.parametrize("layout", ["one", "cp2", "tp2, encoder tp1"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_other_families(
    family: str, layout: str, vlm: dict[str, Path], alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(family, layout, 1, vlm, alone, tmp_path, monkeypatch)


def check(
    family: str, layout: str, mbs: int, vlm: dict[str, Path], alone: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(family)
    found = gradients(vlm[family], layout, rows(), out, monkeypatch, mbs)
    assert found.tokens == expected.tokens
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    difference, name = run.worst(found.tensors, expected.tensors)
    print(f"worst {difference:.1e} in {name}")
    assert difference < TOLERANCE, name


def test_no_image_reaches_another_segment(
    vlm: dict[str, Path], megatron: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the second sequence counts: another picture in the first changes nothing, in the second it does."""
    first, second, rest = rows()[0]
    given = [replace(first, loss_mask=torch.zeros_like(first.loss_mask)), second, rest]
    empty = [replace(one, loss_mask=torch.zeros_like(one.loss_mask)) for one in rows()[1]]
    seen: list[run.Measured] = []
    for number, changed in enumerate((None, 0, 1)):
        row = [
            replace(part, pixels=[patches.flip(0) + 1 for patches in part.pixels]) if at == changed else part
            for at, part in enumerate(given)
        ]
        out = tmp_path / str(number)
        seen.append(gradients(vlm["qwen3_vl"], "cp2", [row, empty], out, monkeypatch))
    assert seen[1].loss == seen[0].loss
    assert run.worst(seen[1].tensors, seen[0].tensors)[0] < 1e-6
    assert abs(seen[2].loss - seen[0].loss) > 1e-4
