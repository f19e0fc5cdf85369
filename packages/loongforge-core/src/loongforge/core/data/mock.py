"""Random tokens and images: a source that needs no file, for throughput measurements and tests of the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from loongforge.core.data.contract import PlacedItem, Sample, SourceRequest, VisualItem
from loongforge.core.errors import DataError

_SIDES = (16, 160)
"""Random images have sides from the one to the other, in pixels, before the processor's rule."""
_TEXT_ONLY = 0.25
"""Share of segments without images."""


class MockSource:
    """Sample `i` is drawn from a generator seeded by `(seed, i)` alone, so any order of access gives the same tokens.

    Packed samples (`packing`) hold segments of random lengths, each a multiple of `segment_multiple`. For a model that
    sees, three of four segments hold random images of unequal sizes, as many as a draw says and the segment has room
    for.
    """

    def __init__(self, request: SourceRequest) -> None:
        if request.vocab_size < 2:
            raise DataError(f"the mock source needs a vocabulary of at least 2 tokens, got {request.vocab_size!r}.")
        if request.packing and request.seq_length % request.segment_multiple:
            raise DataError(
                f"packing needs a sequence length that is a multiple of {request.segment_multiple}, "
                f"got {request.seq_length!r}: change --seq-length."
            )
        if request.visual is not None:
            least = request.visual.image_size(_SIDES[0], _SIDES[0]).items[0].features
            if least + 2 > request.seq_length:
                raise DataError(
                    f"the smallest random image becomes {least} tokens, more than a sequence of {request.seq_length!r} "
                    "has room for: lower data.min_pixels or raise --seq-length."
                )
        self._request = request

    def __len__(self) -> int:
        """Samples asked for; there is no end of them."""
        return self._request.num_samples

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`: random tokens, each labelled with the next one, all of them counted."""
        request = self._request
        generator = np.random.default_rng((request.seed, index))
        stream = generator.integers(0, request.vocab_size, size=request.seq_length + 1, dtype=np.int64)
        sample = Sample(
            tokens=stream[:-1].copy(),
            labels=stream[1:].copy(),
            loss_mask=np.ones(request.seq_length, dtype=np.float32),
            position_ids=np.arange(request.seq_length, dtype=np.int64),
        )
        if request.packing:
            _cut(sample, generator, request.segment_multiple)
        if request.visual is not None:
            _show(sample, generator, request)
        return sample

    def fingerprint(self) -> Mapping[str, str]:
        """Everything the tokens depend on."""
        request = self._request
        facts = {"source": "mock", "seed": request.seed, "seq_length": request.seq_length}
        facts |= {"vocab_size": request.vocab_size, "packing": request.packing}
        facts |= {} if request.visual is None else {"visual": request.visual}
        return {name: str(value) for name, value in facts.items()}

    def report(self) -> Mapping[str, Any]:
        """One line: the data is random."""
        return {"source": "mock", "samples": len(self), "note": "random tokens"}


def open_mock(request: SourceRequest) -> MockSource:
    """The `mock` source."""
    return MockSource(request)


def _cut(sample: Sample, generator: np.random.Generator, multiple: int) -> None:
    """Divide the sample into one to eight segments; the last label of each lies outside it and does not count."""
    units = len(sample["tokens"]) // multiple
    pieces = int(generator.integers(1, min(8, units) + 1))
    borders = np.sort(generator.choice(np.arange(1, units), size=pieces - 1, replace=False)) if pieces > 1 else []
    cu_seqlens = np.array([0, *borders, units], dtype=np.int32) * np.int32(multiple)
    sample["cu_seqlens"] = cu_seqlens
    sample["loss_mask"][cu_seqlens[1:] - 1] = 0.0
    starts = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    sample["position_ids"] -= starts


def _show(sample: Sample, generator: np.random.Generator, request: SourceRequest) -> None:
    """Put random images into the sample's segments, with their position ids; nothing is learned where one is next."""
    assert request.visual is not None, "the caller has looked"
    borders = sample["cu_seqlens"].tolist() if "cu_seqlens" in sample else [0, request.seq_length]
    items: list[VisualItem] = []
    positions: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    for start, end in pairwise(borders):
        placed: list[PlacedItem] = []
        for first, item in _images(generator, request, end - start):
            placed.append(PlacedItem(start=first, grid=item.grid, seconds_per_grid=0.0))
            positions.append(np.arange(start + first, start + first + item.features))
            items.append(item)
        rows.append(request.visual.position_ids(end - start, placed))
    position_ids = np.concatenate(rows, axis=1)
    sample["position_ids"] = position_ids if len(position_ids) > 1 else position_ids[0]
    sample["visual_positions"] = np.concatenate([np.empty(0, dtype=np.int64), *positions])
    sample["grid"] = np.array([item.grid for item in items], dtype=np.int64).reshape(-1, 3)
    sample["tokens"][sample["visual_positions"]] = 0
    before = sample["visual_positions"] - 1
    sample["labels"][before[before >= 0]] = 0
    sample["loss_mask"][before[before >= 0]] = 0.0
    patches = [item.patches for item in items if item.patches is not None]
    if patches:
        sample["pixels"] = np.concatenate(patches)


def _images(generator: np.random.Generator, request: SourceRequest, length: int) -> Iterator[tuple[int, VisualItem]]:
    """Places in a segment and what stands there: images with some tokens of text before each and after the last.

    The same draws happen whether pixels are wanted or not.
    """
    assert request.visual is not None, "the caller has looked"
    if generator.random() < _TEXT_ONLY:
        return
    place = 0
    for _ in range(int(generator.integers(1, 4))):
        height, width = generator.integers(*_SIDES, size=2, endpoint=True).tolist()
        seed = int(generator.integers(1 << 62))
        place += int(generator.integers(1, 5))
        item = request.visual.image_size(height, width).items[0]
        if place + item.features >= length:
            return
        if request.pixels:
            pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
            item = request.visual.image(pixels).items[0]
        yield place, item
        place += item.features
