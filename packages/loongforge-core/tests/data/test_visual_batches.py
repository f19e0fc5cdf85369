"""Micro-batches of a model that sees: items, their places and position ids, padded and packed, from any source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loongforge.core import plugins
from loongforge.core.config.run import DataConfig
from loongforge.core.data import open as opening
from loongforge.core.data.contract import Clip, Placed, PlacedItem, Sample, SourceRequest, VisualItem
from loongforge.core.data.loader import Loader, LoaderShape
from loongforge.core.data.mock import MockSource, open_mock
from loongforge.core.data.source import source_of
from loongforge.core.errors import ConfigError, DataError

SEQ = 64


@dataclass(frozen=True)
class Squares:
    """A feature for every 32 x 32 pixels; position ids that tell items apart."""

    rank: int = 3
    side: int = 32

    image_text = video_text = "<image>"
    marks = ("<image>",)

    def with_limits(self, data: DataConfig) -> Squares:
        return replace(self, side=data.max_pixels or self.side)

    def image(self, pixels: np.ndarray) -> Placed:
        grid = self._grid(*pixels.shape[:2])
        patches = np.resize(pixels.reshape(-1).astype(np.float32), (grid[1] * grid[2], 5))
        return self._placed(grid, patches)

    def image_size(self, height: int, width: int) -> Placed:
        return self._placed(self._grid(height, width), None)

    def frames(self, clip: Clip) -> np.ndarray:
        raise NotImplementedError

    def video(self, clip: Clip, pixels: np.ndarray) -> Placed:
        raise NotImplementedError

    def video_size(self, clip: Clip) -> Placed:
        raise NotImplementedError

    def position_ids(self, length: int, items: Sequence[PlacedItem]) -> np.ndarray:
        rows = np.tile(np.arange(length, dtype=np.int64), (self.rank, 1))
        for item in items:
            size = item.grid[1] * item.grid[2] // 4
            rows[-1, item.start : item.start + size] = -1 - item.start
        return rows

    def _grid(self, height: int, width: int) -> tuple[int, int, int]:
        return (1, 2 * -(-height // self.side), 2 * -(-width // self.side))

    def _placed(self, grid: tuple[int, int, int], patches: np.ndarray | None) -> Placed:
        features = grid[1] * grid[2] // 4
        return Placed(pieces=(VisualItem(grid=grid, features=features, placeholder="<image>", patches=patches),))


def request(**changes: Any) -> SourceRequest:
    values: dict[str, Any] = {
        "paths": (),
        "split": None,
        "part": "train",
        "seq_length": SEQ,
        "num_samples": 40,
        "seed": 3,
        "shuffle": True,
        "packing": False,
        "segment_multiple": 4,
        "vocab_size": 100,
        "tokenizer_path": None,
        "tokenizer_type": None,
        "chat_template": None,
        "cache": Path("unused"),
        "text_field": "text",
        "messages_field": "messages",
        "train_on_prompt": False,
        "overlong": "truncate",
        "loss_mask_eod": False,
        "is_builder": True,
        "barrier": lambda: None,
        "visual": Squares(),
        "position_rank": 3,
    }
    return SourceRequest(**{**values, **changes})


def shape(micro_batch_size: int, workers: int = 0, **changes: Any) -> LoaderShape:
    values: dict[str, Any] = {"num_microbatches": 1, "num_workers": workers, "position_rank": 3, "visual": True}
    return LoaderShape(micro_batch_size=micro_batch_size, **{**values, **changes})


@pytest.mark.parametrize("packing", [False, True])
def test_random_images_are_a_function_of_seed_and_number(packing: bool) -> None:
    source = open_mock(request(packing=packing))
    kinds = set()
    for number in [*range(39, -1, -1)]:
        sample, again = source[number], open_mock(request(packing=packing))[number]
        assert set(sample) == set(again)
        for name in sample:
            np.testing.assert_array_equal(sample[name], again[name])
        _check(sample)
        kinds.add(min(len(sample["grid"]), 2))
    assert kinds == {0, 1, 2}
    assert not np.array_equal(open_mock(request(seed=4))[3]["tokens"], source[3]["tokens"])


def _check(sample: Sample) -> None:
    grid, places = sample["grid"], sample["visual_positions"]
    assert grid.shape == (len(grid), 3)
    assert len(places) == int(grid.prod(axis=1).sum()) // 4
    assert (np.diff(places) > 0).all()
    assert ("pixels" in sample) == bool(len(grid))
    if len(grid):
        assert sample["pixels"].shape == (int(grid.prod(axis=1).sum()), 5)
        assert sample["pixels"].dtype == np.float32
    assert (sample["tokens"][places] == 0).all()
    assert (sample["loss_mask"][places[places > 0] - 1] == 0).all()
    assert sample["position_ids"].shape == (3, SEQ)
    for start, end in pairwise(sample.get("cu_seqlens", np.array([0, SEQ]))):
        inside = places[(places >= start) & (places < end)]
        np.testing.assert_array_equal(sample["position_ids"][0, start:end], np.arange(end - start))
        np.testing.assert_array_equal(np.flatnonzero(sample["position_ids"][2, start:end] < 0), inside - start)


@pytest.mark.parametrize("packing", [False, True])
def test_sizes_alone_change_nothing_else(packing: bool) -> None:
    seeing, blind = open_mock(request(packing=packing)), open_mock(request(packing=packing, pixels=False))
    for number in range(12):
        sample = seeing[number]
        sample.pop("pixels", None)
        assert set(sample) == set(blind[number])
        for name in sample:
            np.testing.assert_array_equal(sample[name], blind[number][name])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_micro_batch_holds_its_samples_one_after_the_other(packing: bool, workers: int) -> None:
    source = open_mock(request(packing=packing))
    with Loader(source, shape(3, workers)) as loader:
        batches = list(loader)
    assert len(batches) == 13
    for step, batch in enumerate(batches):
        samples = [source[3 * step + row] for row in range(3)]
        whole = (1, 3 * SEQ) if packing else (3, SEQ)
        assert batch["tokens"].shape == whole
        assert batch["position_ids"].shape == (3, *whole)
        flat = batch["position_ids"].reshape(3, 3, SEQ)
        for row, sample in enumerate(samples):
            np.testing.assert_array_equal(flat[:, row], sample["position_ids"])
        np.testing.assert_array_equal(batch["items_of"], [len(sample["grid"]) for sample in samples])
        np.testing.assert_array_equal(batch["grid"], np.concatenate([sample["grid"] for sample in samples]))
        shifted = [sample["visual_positions"] + row * SEQ for row, sample in enumerate(samples)]
        np.testing.assert_array_equal(batch["visual_positions"], np.concatenate(shifted))
        assert (batch["tokens"].reshape(-1)[batch["visual_positions"]] == 0).all()
        pixels = [sample["pixels"] for sample in samples if "pixels" in sample]
        assert ("pixels" in batch) == bool(pixels)
        if pixels:
            np.testing.assert_array_equal(batch["pixels"], np.concatenate(pixels))
            assert batch["pixels"].dtype == torch.float32


def test_a_source_of_text_feeds_a_model_that_sees() -> None:
    with Loader(open_mock(request(visual=None)), shape(2)) as loader:
        batch = next(loader)
    assert batch["position_ids"].shape == (3, 2, SEQ)
    assert (batch["position_ids"] == torch.arange(SEQ)).all()
    assert batch["items_of"].tolist() == [0, 0]
    assert batch["grid"].shape == (0, 3)
    assert batch["visual_positions"].shape == (0,)
    assert "pixels" not in batch
    with Loader(open_mock(request(visual=None)), shape(2, visual=False, position_rank=1)) as loader:
        batch = next(loader)
    assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids", "sample_ids"}
    assert batch["position_ids"].shape == (2, SEQ)


def test_pixels_for_some_samples_only_are_refused() -> None:
    class Forgetful(MockSource):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            if index == next(number for number in range(40) if "pixels" in open_mock(request())[number]):
                sample.pop("pixels", None)
            return sample

    with pytest.raises(DataError, match=r"only .* bring pixels"), Loader(Forgetful(request()), shape(20)) as loader:
        next(loader)


def test_images_larger_than_the_sequence_are_refused() -> None:
    with pytest.raises(DataError, match=r"lower data\.min_pixels"):
        open_mock(request(visual=Squares(side=1)))


def plan(*, encoder: bool, phase: str = "sft", rank: int = 3, **changes: Any) -> Any:
    """As much of a plan as choosing a source asks for."""
    model = SimpleNamespace(
        image_encoder=object() if encoder else None, model_type=changes.pop("model_type", "seen"),
        foundation=SimpleNamespace(family="acme"),
    )  # fmt: skip
    data = DataConfig(**{"data_path": ("a.jsonl",), **changes})
    config = SimpleNamespace(model=model, data=data, train=SimpleNamespace(training_phase=phase))
    return SimpleNamespace(config=config, geometry=SimpleNamespace(position_rank=rank))


def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [
        plugins.SourceSpec(name="text", api=(1, 0), open=plugins.Lazy("a:b"), phases=("pretrain",)),
        plugins.SourceSpec(name="chat", api=(1, 0), open=plugins.Lazy("a:b"), phases=("sft",)),
        plugins.SourceSpec(name="seen", api=(1, 0), open=plugins.Lazy("a:b"), modality="vision-language"),
    ]
    monkeypatch.setattr(plugins, "usable", lambda kind: [SimpleNamespace(name=spec.name, spec=spec) for spec in specs])
    monkeypatch.setattr(plugins, "load", lambda kind, name: next(spec for spec in specs if spec.name == name))


@pytest.mark.parametrize(
    ("encoder", "phase", "expected"),
    [(False, "pretrain", "text"), (False, "sft", "chat"), (True, "pretrain", "seen"), (True, "sft", "seen")],
)
def test_the_source_follows_the_model(
    encoder: bool, phase: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(monkeypatch)
    assert source_of(plan(encoder=encoder, phase=phase).config).name == expected


def test_a_missing_source_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "usable", lambda kind: [])
    with pytest.raises(DataError, match=r"vision-language data for 'sft': pip install 'loongforge-data\[vision\]'"):
        source_of(plan(encoder=True).config)


def test_the_processor_is_the_compositions_with_the_runs_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    composition = SimpleNamespace(processor=lambda: lambda model: Squares())
    monkeypatch.setattr(plugins, "load", lambda kind, name: {("compositions", "seen"): composition}[kind, name])
    assert opening.visual_processor(plan(encoder=True, max_pixels=77)) == Squares(side=77)
    assert opening.visual_processor(plan(encoder=False)) is None
    with pytest.raises(ConfigError, match="model_type"):
        opening.visual_processor(plan(encoder=True, model_type=None))
    with pytest.raises(ConfigError) as refused:
        opening.visual_processor(plan(encoder=True, rank=1))
    assert str(refused.value) == (
        "model.model_type=seen counts positions in 3 row(s), but model.foundation (acme) takes 1: choose a composition "
        "that writes as many, or a foundation with mrope_section."
    )
