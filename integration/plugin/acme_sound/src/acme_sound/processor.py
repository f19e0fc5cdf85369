"""From a sound to windows of samples, and to its place among the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from loongforge.core.config.run import DataConfig, ModelConfig
from loongforge.core.data.contract import Clip, Placed, PlacedItem, VisualItem
from loongforge.core.errors import DataError

MARK, NEVER = "<|sound|>", "<|acme sees nothing|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class AcmeEarProcessor:
    """A `VisualProcessor` that sees nothing, and a `SoundProcessor`: what is not a whole window is left out."""

    window: int
    position_rank: int
    """Rows of position ids that the foundation takes."""
    sampling_rate: int = 8000

    def with_limits(self, data: DataConfig) -> AcmeEarProcessor:
        """Itself; no limit is about sounds."""
        return self

    def sound(self, samples: np.ndarray) -> Placed:
        """One sound, float32 `[samples]`."""
        windows = len(samples) // self.window
        return self._placed(windows, samples[: windows * self.window].reshape(windows, self.window))

    def sound_size(self, samples: int) -> Placed:
        """What `sound` answers for that many samples, without patches."""
        return self._placed(samples // self.window, None)

    @property
    def sound_text(self) -> str:
        """What a chat template writes where a sound stands."""
        return MARK

    def position_ids(self, length: int, items: Sequence[PlacedItem]) -> np.ndarray:
        """int64 `[position_rank, length]`: features count like words."""
        return np.tile(np.arange(length, dtype=np.int64), (self.position_rank, 1))

    def image(self, pixels: np.ndarray) -> NoReturn:
        """Refused."""
        raise DataError("acme_hears sees nothing: take the images and videos out of the data.")

    def image_size(self, height: int, width: int) -> NoReturn:
        """Refused."""
        self.image(np.empty(0))

    def frames(self, clip: Clip) -> NoReturn:
        """Refused."""
        self.image(np.empty(0))

    def video(self, clip: Clip, pixels: np.ndarray) -> NoReturn:
        """Refused."""
        self.image(np.empty(0))

    def video_size(self, clip: Clip) -> NoReturn:
        """Refused."""
        self.image(np.empty(0))

    @property
    def image_text(self) -> str:
        """No template writes it."""
        return NEVER

    @property
    def video_text(self) -> str:
        """No template writes it."""
        return NEVER

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens of a sound."""
        return (MARK,)

    def _placed(self, windows: int, patches: np.ndarray | None) -> Placed:
        if not windows:
            raise DataError(f"a sound shorter than a window of {self.window} samples at {self.sampling_rate} Hz.")
        item = VisualItem(grid=(1, windows, 1), features=windows, placeholder=MARK, patches=patches)
        return Placed(pieces=(item,))


def processor(model: ModelConfig) -> AcmeEarProcessor:
    """The processor of a model; its ear says how long a window is, its foundation how positions are counted."""
    assert model.image_encoder is not None, "a composition has an encoder"
    foundation = model.foundation.geometry.geometry()
    return AcmeEarProcessor(window=model.image_encoder.geometry.window, position_rank=foundation.position_rank)
