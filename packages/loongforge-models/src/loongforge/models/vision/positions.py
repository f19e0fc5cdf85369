"""Position ids of a document of text, images and videos: time, height and width of every token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loongforge.core.data.contract import PlacedItem


def multimodal_positions(
    length: int, items: Sequence[PlacedItem], *, merge: int, tokens_per_second: float
) -> np.ndarray:
    """int64 `[3, length]` of one document whose features stand at `items`, ascending (Qwen2-VL, 2024).

    Text moves all three rows on by one. The features of an item count its own merged grid from the position that its
    beginning has, time in steps of `tokens_per_second * seconds_per_grid` (1 without seconds); text goes on after the
    longer side of its frame.
    """
    positions = np.broadcast_to(np.arange(length, dtype=np.int64), (3, length)).copy()
    if not items:
        return positions
    starts = np.array([item.start for item in items], dtype=np.int64)
    grids = np.array([item.grid for item in items], dtype=np.int64)
    frames, rows, columns = grids[:, 0], grids[:, 1] // merge, grids[:, 2] // merge
    sizes = frames * rows * columns
    ends = starts + sizes
    assert (starts[1:] >= ends[:-1]).all(), "items overlap or are not ascending"
    assert ends[-1] <= length, f"an item ends at {ends[-1]} of {length} positions"
    shifts = np.concatenate([[0], np.cumsum(np.maximum(rows, columns) - sizes)])
    positions += shifts[np.searchsorted(ends, np.arange(length), side="right")]

    item = np.repeat(np.arange(len(items)), sizes)
    within = np.arange(len(item)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    area, width = (rows * columns)[item], columns[item]
    seconds = np.array([entry.seconds_per_grid for entry in items])
    interval = np.where(seconds > 0, seconds * tokens_per_second, 1.0).astype(np.float32)  # fp32: as models round it
    grid = np.stack(
        [
            ((within // area).astype(np.float32) * interval[item]).astype(np.int64),
            within % area // width,
            within % width,
        ]
    )
    positions[:, starts[item] + within] = grid + (starts + shifts[:-1])[item]
    return positions
