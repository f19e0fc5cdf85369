"""A packed row trains every case as its documents would one by one."""

from __future__ import annotations

from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from case import LAYOUTS
from cases import CASES
from safetensors.torch import load_file, save_file

from loongforge.core.testing import fp32_tolerance, run_distributed

DOCUMENTS = (8, 12, 4, 8)
"""Lengths in a row of 32, all multiples of 2 x cp."""
ENDS = (0, *accumulate(DOCUMENTS))


def layout_of(name: str) -> str:
    """Context parallelism cuts the documents themselves."""
    return next(layout for layout in ("cp2", "tp2-sp", "tp2", "one") if layout in CASES[name].layouts)


RUNS: list[tuple[str, tuple[str, ...]]] = [*((name, ()) for name in CASES), ("deepseek_v32", ("--dsa-route", "gather"))]
"""Cases, and flags besides."""


@pytest.mark.parametrize(("name", "flags"), RUNS, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_packed_documents(name: str, flags: tuple[str, ...], zoo: Any, results: dict[str, Any], tmp_path: Path) -> None:
    from proof import GRADIENTS, config_of, one_batch, read

    from loongforge.ckpt.verify.batch import make_batch
    from loongforge.ckpt.verify.difference import Side, differences

    layout, directory = layout_of(name), zoo.checkpoint(name)
    config = config_of(CASES[name], directory, layout, "--global-batch-size", "1", *flags)
    row = make_batch(config, 1)
    row["loss_mask"][0, DOCUMENTS[0] - 2 : DOCUMENTS[0]] = 0  # padding at the end of a document
    parts = [{key: row[key][:, start:end].clone() for key in row} for start, end in pairwise(ENDS)]
    paths = [tmp_path / f"{number}.safetensors" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        save_file(part, path)
    alone = zoo.reference.documents(name, directory, paths, tmp_path / "reference.safetensors")
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    ends = torch.tensor(ENDS, dtype=torch.int32)
    packed = {**row, "position_ids": positions, "cu_seqlens": ends, "sample_ids": torch.zeros(1, dtype=torch.int64)}
    work = partial(one_batch, config=config, micro_batches=[packed], scratch=tmp_path)
    loss, _ = run_distributed(work, LAYOUTS[layout][1])[0]
    no_logits = torch.zeros(1)
    found = differences(
        Side(loss=loss, logits=no_logits, gradients=read(tmp_path / GRADIENTS)),
        Side(loss=alone["loss"], logits=no_logits, gradients=load_file(tmp_path / "reference.safetensors")),
    )
    results.setdefault(name, {})["packed"] = {"layout": layout, "worst": found[0].worst, "where": found[0].name}
    assert found[0].worst < fp32_tolerance(CASES[name].tolerance), found[:5]
