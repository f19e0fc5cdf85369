"""Position ids are those of transformers' models; one row where the foundation has no sections."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loongforge.core.data.contract import PlacedItem

Piece = int | tuple[str, tuple[int, int, int], float]
"""Tokens of text, or an item: kind, grid in patches, seconds per grid."""

DOCUMENTS: dict[str, list[Piece]] = {
    "text": [17],
    "image": [5, ("image", (1, 6, 10), 0), 9],
    "image first": [("image", (1, 8, 4), 0), 3],
    "image last": [3, ("image", (1, 2, 2), 0)],
    "several images": [2, ("image", (1, 4, 12), 0), 1, ("image", (1, 14, 2), 0), 1, ("image", (1, 2, 2), 0), 30],
    "video": [4, ("video", (5, 4, 6), 0.5), 8],
    "long video": [4, ("video", (11, 2, 4), 1.3), 8],
    "mixed": [1, ("video", (3, 4, 4), 2 / 1.9), 2, ("image", (1, 6, 6), 0), 5, ("video", (2, 2, 8), 1.0), 6],
}


def rope_index(name: str, pieces: list[Piece], videos: list[tuple[int, int, int]] | None = None) -> tuple[Any, int]:
    """transformers' answer, and the length of the document; `videos` are their grids when pieces hold time steps."""
    if name == "qwen2_5_vl":
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel as Model
    else:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel as Model
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = MethodType(Model.get_vision_position_ids, model)
    kinds, grids, seconds = [], {"image": [], "video": []}, []
    for piece in pieces:
        if isinstance(piece, int):
            kinds += [0] * piece
            continue
        kind, grid, pause = piece
        kinds += [1 if kind == "image" else 2] * (grid[0] * grid[1] * grid[2] // 4)
        grids[kind].append(grid)
        if kind == "video":
            seconds.append(pause)
    more = {"second_per_grid_ts": torch.tensor(seconds)} if name == "qwen2_5_vl" and seconds else {}
    positions, _ = Model.get_rope_index(
        model,
        input_ids=torch.zeros(1, len(kinds), dtype=torch.long),
        mm_token_type_ids=torch.tensor([kinds]),
        image_grid_thw=torch.tensor(grids["image"]) if grids["image"] else None,
        video_grid_thw=torch.tensor(videos or grids["video"]) if grids["video"] else None,
        **more,
    )
    return positions[:, 0].numpy(), len(kinds)


def placed(pieces: list[Piece]) -> list[PlacedItem]:
    start, items = 0, []
    for piece in pieces:
        if isinstance(piece, int):
            start += piece
            continue
        _, grid, pause = piece
        items.append(PlacedItem(start=start, grid=grid, seconds_per_grid=pause))
        start += grid[0] * grid[1] * grid[2] // 4
    return items


@pytest.mark.parametrize("document", DOCUMENTS)
def test_qwen2_5_vl(document: str, make_processor) -> None:
    pieces = DOCUMENTS[document]
    expected, length = rope_index("qwen2_5_vl", pieces)
    found = make_processor("qwen2_5_vl").position_ids(length, placed(pieces))
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_qwen3_vl(document: str, make_processor) -> None:
    """A video is one item for each time step, with its time stamp between them as text."""
    split: list[Piece] = []
    for piece in DOCUMENTS[document]:
        if isinstance(piece, int) or piece[0] == "image":
            split.append(piece)
            continue
        for _ in range(piece[1][0]):
            split += [3, ("video", (1, *piece[1][1:]), 0.0), 1]
    videos = [piece[1] for piece in DOCUMENTS[document] if not isinstance(piece, int) and piece[0] == "video"]
    expected, length = rope_index("qwen3_vl", split, videos)
    np.testing.assert_array_equal(make_processor("qwen3_vl").position_ids(length, placed(split)), expected)


def test_text_after_the_document_goes_on_counting(make_processor) -> None:
    """What pads a segment continues the document; the document's own positions do not depend on it."""
    pieces = DOCUMENTS["mixed"]
    expected, length = rope_index("qwen2_5_vl", pieces)
    longer = make_processor("qwen2_5_vl").position_ids(length + 5, placed(pieces))
    np.testing.assert_array_equal(longer[:, :length], expected)
    np.testing.assert_array_equal(longer[:, length:], expected[:, -1:] + np.arange(1, 6))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_foundation_without_sections_counts_tokens(name: str, make_processor) -> None:
    found = make_processor(name, rank=1).position_ids(40, placed(DOCUMENTS["image"]))
    np.testing.assert_array_equal(found, np.arange(40)[None])
