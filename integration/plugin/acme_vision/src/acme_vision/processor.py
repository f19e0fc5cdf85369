"""From an image to the patches that the encoder takes, and to its place among the tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
from PIL import Image

from acme_vision.config import CHANNELS, MERGE
from loongforge.core.config.run import DataConfig, ModelConfig
from loongforge.core.data.contract import Clip, Placed, PlacedItem, VisualItem
from loongforge.core.errors import DataError

MARK = "<|image_pad|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class AcmeProcessor:
    """Images keep their shape, within a number of pixels; both sides become multiples of two patches."""

    patch_size: int
    position_rank: int
    """Rows of position ids that the foundation takes."""
    max_pixels: int = 448 * 448

    def with_limits(self, data: DataConfig) -> AcmeProcessor:
        """The same with the limit that the run states."""
        return replace(self, max_pixels=data.max_pixels or self.max_pixels)

    def image(self, pixels: np.ndarray) -> Placed:
        """One image, uint8 `[H, W, 3]` RGB."""
        grid = self._grid(*pixels.shape[:2])
        size = (grid[2] * self.patch_size, grid[1] * self.patch_size)
        values = np.asarray(Image.fromarray(pixels).resize(size), dtype=np.float32) / 127.5 - 1
        side, squares = self.patch_size, (grid[1] // MERGE, grid[2] // MERGE)
        cut = values.reshape(squares[0], MERGE, side, squares[1], MERGE, side, CHANNELS)
        # Patches of one merged square are neighbours; within a patch: colour, row, column.
        patches = cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(math.prod(grid), CHANNELS * side * side)
        return self._placed(grid, patches)

    def image_size(self, height: int, width: int) -> Placed:
        """What `image` answers for an image of that size, without patches."""
        return self._placed(self._grid(height, width), None)

    def frames(self, clip: Clip) -> NoReturn:
        """Refused."""
        raise DataError("acme_vl sees still images, not videos: take the videos out of the data.")

    def video_size(self, clip: Clip) -> NoReturn:
        """Refused."""
        self.frames(clip)

    def video(self, clip: Clip, pixels: np.ndarray) -> NoReturn:
        """Refused."""
        self.frames(clip)

    def position_ids(self, length: int, items: Sequence[PlacedItem]) -> np.ndarray:
        """int64 `[position_rank, length]`: features count like words."""
        return np.tile(np.arange(length, dtype=np.int64), (self.position_rank, 1))

    @property
    def image_text(self) -> str:
        """What a chat template writes where an image stands."""
        return MARK

    @property
    def video_text(self) -> str:
        """The same; a video is refused when its size is asked for."""
        return MARK

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens of these texts."""
        return (MARK,)

    def _grid(self, height: int, width: int) -> tuple[int, int, int]:
        unit = self.patch_size * MERGE
        scale = min(1.0, math.sqrt(self.max_pixels / (height * width)))
        rows, columns = (max(1, int(side * scale / unit)) * MERGE for side in (height, width))
        return 1, rows, columns

    def _placed(self, grid: tuple[int, int, int], patches: np.ndarray | None) -> Placed:
        features = math.prod(grid) // MERGE**2
        return Placed(pieces=(VisualItem(grid=grid, features=features, placeholder=MARK, patches=patches),))


def processor(model: ModelConfig) -> AcmeProcessor:
    """The processor of a model; its encoder says how large a patch is, its foundation how positions are counted."""
    assert model.image_encoder is not None, "a composition has an encoder"
    foundation = model.foundation.geometry.geometry()
    return AcmeProcessor(patch_size=model.image_encoder.geometry.patch_size, position_rank=foundation.position_rank)
