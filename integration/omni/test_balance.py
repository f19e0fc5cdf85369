"""Balancing changes who computes a document and nothing else: loss, gradients and the documents of a step stay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import omni_run
import pytest
import tiny_files

from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import RunConfig
from loongforge.core.testing import run_distributed

TOLERANCE = 1e-5
"""Relative to a tensor's largest entry, fp32: sums of other parts of a batch; measured worst 4.2e-7."""
Document = tuple[bytes, float, tuple[Any, ...]]

CASES: dict[str, tuple[str, int, list[str]]] = {
    "text, packed": ("chat", 2, ["--global-batch-size", "8", "--micro-batch-size", "2"]),
    "text, packed, 4 ranks": ("chat", 4, ["--global-batch-size", "16", "data.balance_sync=micro_batch"]),
    "images, packed": ("vlm", 2, ["--global-batch-size", "4"]),
    "images, each alone, 4 ranks": ("vlm", 4, ["--global-batch-size", "8", "--no-packing", "--seed", "52"]),
    "images, tp2 and ahead": (
        "vlm", 4,
        ["--global-batch-size", "6", "--tensor-model-parallel-size", "2", "--enable-full-hetero-dp",
         "data.balance_sync=micro_batch"],
    ),
}  # fmt: skip
"""Source, processes, flags."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank saw of a step."""

    loss: float
    tokens: int
    documents: list[Document]
    """Of this rank: tokens and labels, how many count, the grids of the images in it and the sum of each one's patches.
    """
    images: int
    digest: int | None
    numbers: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Files:
    """Models and data by source."""

    models: dict[str, Path]
    data: dict[str, Path]

    def config(self, source: str, cache: Path, flags: Sequence[str]) -> RunConfig:
        """An fp32 run on the files of a source."""
        length = {"chat": "256", "vlm": "192"}[source]
        words = ["--load", self.models[source], "--data-path", self.data[source], "--training-phase", "sft", "--fp32"]
        words += ["--seq-length", length, "--train-iters", "2", "--num-workers", "0", "--data-cache-path", cache]
        if source == "vlm":
            words += ["--min-pixels", "64", "--max-pixels", "1024", "--video-max-pixels", "512"]
        return resolve([*map(str, words), *flags])


@pytest.fixture(scope="module")
def files(megatron: Any, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Pictures and talk about them, and conversations of very unequal length, for a tiny model that sees."""
    path = tmp_path_factory.mktemp("balance")
    tiny_files.make_model(path / "seeing")
    tiny_files.make_data(path / "pictures")
    tiny_files.make_text_model(path / "reading", path / "seeing")
    rows = [
        [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "so " * words}]
        for number, words in enumerate(np.random.default_rng(0).lognormal(2.4, 1.1, 120).clip(1, 70).astype(int))
    ]
    (path / "talk.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return Files(
        models={"vlm": path / "seeing", "chat": path / "reading"},
        data={"vlm": path / "pictures/train.jsonl", "chat": path / "talk.jsonl"},
    )


@pytest.mark.parametrize("case", CASES)
def test_same_documents_loss_and_gradients(case: str, files: Files, tmp_path: Path) -> None:
    source, world, flags = CASES[case]
    runs: list[list[Seen]] = []
    for number, more in enumerate(([], ["--use-vlm-dp-balance"])):
        config = files.config(source, tmp_path / "cache", [*flags, *more])
        runs.append(run_distributed(partial(_step, config=config, out=tmp_path / str(number)), world))
    plain, even = runs
    assert {one.digest for one in plain} == {None}
    assert len({one.digest for one in even}) == 1, "every rank has dealt alike"
    assert len({tuple(one.numbers.items()) for one in even}) == 1
    numbers = even[0].numbers
    print(case, numbers)
    assert numbers["balance_moved"] > 0, "the case deals something"
    assert 1 <= numbers["balance_ratio"] < numbers["balance_before"]
    assert documents(even, world) == documents(plain, world)
    assert [one.documents for one in even] != [one.documents for one in plain]
    if "alone" in case:
        assert all(any(one.images == 0 for one in run) for run in runs), "a rank without images, before and after"
    assert even[0].tokens == plain[0].tokens
    assert even[0].loss == pytest.approx(plain[0].loss, rel=1e-6)
    difference, name = omni_run.worst(omni_run.read(tmp_path / "1"), omni_run.read(tmp_path / "0"))
    print(f"worst {difference:.1e} in {name}")
    assert difference < TOLERANCE, name


def documents(seen: list[Seen], world: int) -> list[Document]:
    """Those of all data parallel ranks, sorted; ranks that share a replica read the same."""
    replicas = {tuple(one.documents) for one in seen}
    assert len(replicas) in (world, world // 2)
    return sorted(document for replica in replicas for document in replica)


def _step(worker: Any, config: RunConfig, out: Path) -> Seen:
    """Loss and gradients of the first step of a run, from its files."""
    import torch

    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.export import export_hf
    from loongforge.core.checkpoint.start import find_start
    from loongforge.core.data.open import open_data
    from loongforge.core.step.forward import forward_backward

    with part_of(config) as part:
        training = omni_run.built(part)
        for wrapped in training.wrapped:
            wrapped.zero_grad_buffer()
        with open_data(part.plan, part.world, find_start(config.checkpoint)).loader(0) as loader:
            batches = loader.step()
            deal = loader.deal
        loss, tokens = forward_backward(
            part.plan, part.world, training.chunks, batches, training.feed, forward_only=False
        )
        with torch.no_grad():
            for modules in part.model.modules.values():
                for module in modules:
                    for parameter in module.parameters():
                        # The export maps gradients as it maps parameters.
                        parameter.copy_(parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter))
        export_hf(part.plan, part.world, part.model, out)
    return Seen(
        loss=loss, tokens=tokens, documents=[one for batch in batches for one in _documents(batch)],
        images=sum(len(batch.get("grid", ())) for batch in batches), digest=deal and deal.digest,
        numbers=dict(deal.numbers) if deal else {},
    )  # fmt: skip


def _documents(batch: dict[str, Any]) -> list[Document]:
    """Segments of packed rows, or whole rows, without those that only pad."""
    rows, length = batch["tokens"].shape
    ends = batch["cu_seqlens"].tolist() if "cu_seqlens" in batch else list(range(0, rows * length + 1, length))
    tokens, labels, mask = (batch[name].reshape(-1) for name in ("tokens", "labels", "loss_mask"))
    grids, patches, places = batch.get("grid"), batch.get("pixels"), batch.get("visual_positions")
    item, patch = 0, 0
    found: list[Document] = []
    for start, end in pairwise(ends):
        seen: list[Any] = []
        features = 0 if places is None else int(((places >= start) & (places < end)).sum())
        while features > 0:
            assert grids is not None, "features come from items"
            assert patches is not None, "every rank of these layouts encodes"
            grid = tuple(grids[item].tolist())
            count = int(np.prod(grid))
            seen.append((grid, float(patches[patch : patch + count].double().sum())))
            item, patch, features = item + 1, patch + count, features - count // 4
        if mask[start:end].any():
            content = tokens[start:end].numpy().tobytes() + labels[start:end].numpy().tobytes()
            found.append((content, float(mask[start:end].sum()), tuple(seen)))
    return found
