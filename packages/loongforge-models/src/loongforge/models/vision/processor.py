"""Images and videos for the Qwen vision encoders: resized, normalised, cut into patches, and placed among text."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from loongforge.core.config.run import DataConfig, ModelConfig
from loongforge.core.data.contract import Clip, Placed, PlacedItem, VisualItem
from loongforge.core.errors import ConfigError, DataError
from loongforge.models.vision.positions import multimodal_positions

CHANNELS, TEMPORAL_PATCH = 3, 2
"""Of every patch: RGB, two frames."""
EXTREME_ASPECT = 200
_START, _IMAGE, _VIDEO, _END = "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenProcessor(ABC):
    """What the generations share: the rule for images, and patches in the order of merged squares.

    Areas are in pixels after resizing; both sides become multiples of `patch_size * merge_size`.
    """

    patch_size: int
    merge_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    min_pixels: int
    max_pixels: int
    fps: float
    """Video frames per second to look at."""
    min_frames: int
    max_frames: int
    position_rank: int
    """Rows of position ids that the foundation takes."""

    @abstractmethod
    def frames(self, clip: Clip) -> np.ndarray:
        """Indices int64 of the frames to look at."""

    @abstractmethod
    def _frame_size(self, clip: Clip, count: int) -> tuple[int, int]:
        """Height and width of the `count` chosen frames after resizing."""

    @abstractmethod
    def _place_video(self, clip: Clip, grid: tuple[int, int, int], patches: np.ndarray | None) -> Placed:
        """Text and items of a video of that grid."""

    @abstractmethod
    def with_limits(self, data: DataConfig) -> Self:
        """The same with the limits that `data` states; `ConfigError` when they contradict each other."""

    @abstractmethod
    def position_ids(self, length: int, items: Sequence[PlacedItem]) -> np.ndarray:
        """int64 `[position_rank, length]` of one document."""

    @property
    def image_text(self) -> str:
        """What a chat template writes where an image stands."""
        return _START + _IMAGE + _END

    @property
    def video_text(self) -> str:
        """What a chat template writes where a video stands."""
        return _START + _VIDEO + _END

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens that those texts are made of."""
        return _START, _IMAGE, _VIDEO, _END

    def image(self, pixels: np.ndarray) -> Placed:
        """One image, uint8 `[H, W, 3]` RGB; `DataError` for an extreme aspect ratio."""
        height, width = self._image_size(*pixels.shape[:2])
        return self._place_image((height, width), self._patches(pixels[None], height, width))

    def image_size(self, height: int, width: int) -> Placed:
        """What `image` answers for an image of that size, without patches."""
        return self._place_image(self._image_size(height, width), None)

    def video(self, clip: Clip, pixels: np.ndarray) -> Placed:
        """The chosen frames of a video, uint8 `[T, H, W, 3]`."""
        count = len(self.frames(clip))
        assert len(pixels) == count, f"{len(pixels)} frames where {count} were chosen"
        height, width = self._frame_size(clip, count)
        return self._place_video(clip, self._video_grid(clip), self._patches(pixels, height, width))

    def video_size(self, clip: Clip) -> Placed:
        """What `video` answers, without patches."""
        return self._place_video(clip, self._video_grid(clip), None)

    def _limited(self, data: DataConfig, **more: Any) -> Self:
        stated = {
            "min_pixels": data.min_pixels,
            "max_pixels": data.max_pixels,
            "fps": data.fps,
            "min_frames": data.fps_min_frames,
            "max_frames": data.fps_max_frames,
            **more,
        }
        limited = replace(self, **{name: value for name, value in stated.items() if value is not None})
        problems = [
            f"data.{least}: {getattr(limited, low)!r} is more than data.{most}={getattr(limited, high)!r}."
            for least, low, most, high in (
                ("min_pixels", "min_pixels", "max_pixels", "max_pixels"),
                ("fps_min_frames", "min_frames", "fps_max_frames", "max_frames"),
            )
            if getattr(limited, low) > getattr(limited, high)
        ]
        if problems:
            raise ConfigError(*problems)
        return limited

    def _image_size(self, height: int, width: int) -> tuple[int, int]:
        return _fit(height, width, self._factor, self.min_pixels, self.max_pixels)

    def _place_image(self, size: tuple[int, int], patches: np.ndarray | None) -> Placed:
        grid = (1, size[0] // self.patch_size, size[1] // self.patch_size)
        return Placed(pieces=(_START, self._item(grid, _IMAGE, patches), _END))

    def _video_grid(self, clip: Clip) -> tuple[int, int, int]:
        count = len(self.frames(clip))
        height, width = self._frame_size(clip, count)
        return -(-count // TEMPORAL_PATCH), height // self.patch_size, width // self.patch_size

    def _item(self, grid: tuple[int, int, int], placeholder: str, patches: np.ndarray | None) -> VisualItem:
        features = math.prod(grid) // self.merge_size**2
        return VisualItem(grid=grid, features=features, placeholder=placeholder, patches=patches)

    @property
    def _factor(self) -> int:
        return self.patch_size * self.merge_size

    def _patches(self, frames: np.ndarray, height: int, width: int) -> np.ndarray:
        """Frames uint8 `[T, H, W, 3]` to float32 `[t * h * w, patch_dim]`; the last one repeats to fill a patch."""
        resized = np.stack([_resize(frame, height, width) for frame in frames])
        if missing := -len(resized) % TEMPORAL_PATCH:
            resized = np.concatenate([resized, np.repeat(resized[-1:], missing, axis=0)])
        patch, merge = self.patch_size, self.merge_size
        steps, rows, columns = len(resized) // TEMPORAL_PATCH, height // self._factor, width // self._factor
        cut = resized.reshape(steps, TEMPORAL_PATCH, rows, merge, patch, columns, merge, patch, CHANNELS)
        cut = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # [t, rows, columns, merge, merge, channel, frame, patch, patch]
        values = np.empty(cut.shape, dtype=np.float32)
        table = self._normalised()
        for channel in range(CHANNELS):
            values[:, :, :, :, :, channel] = table[channel][cut[:, :, :, :, :, channel]]
        return values.reshape(-1, CHANNELS * TEMPORAL_PATCH * patch * patch)

    def _normalised(self) -> np.ndarray:
        """float32 `[channel, 256]`: what each byte becomes, rounded where the reference rounds."""
        scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        mean, std = np.array(self.mean, dtype=np.float32)[:, None], np.array(self.std, dtype=np.float32)[:, None]
        return (scaled - mean) / std


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2_5Processor(QwenProcessor):
    """Qwen2.5-VL: a video is one item, its time steps spaced by seconds in the position ids."""

    tokens_per_second: float
    frame_min_pixels: int = 128 * 28 * 28
    frame_max_pixels: int = 768 * 28 * 28
    """Area of one video frame."""
    clip_tokens: int = 115200
    """Features of a whole video that its frames share evenly."""

    def frames(self, clip: Clip) -> np.ndarray:
        """Indices int64 of an even number of frames, at even steps from the first."""
        most = min(self.max_frames, clip.frames) // TEMPORAL_PATCH * TEMPORAL_PATCH
        wanted = min(max(clip.frames / clip.fps * self.fps, self.min_frames), most, clip.frames)
        count = max(1, math.floor(wanted / TEMPORAL_PATCH) * TEMPORAL_PATCH)
        return np.arange(count, dtype=np.int64) * clip.frames // count

    def _frame_size(self, clip: Clip, count: int) -> tuple[int, int]:
        share = self.clip_tokens * self._factor**2 * TEMPORAL_PATCH // count
        most = max(min(self.frame_max_pixels, share), int(self.frame_min_pixels * 1.05))
        return _fit(clip.height, clip.width, self._factor, self.frame_min_pixels, most)

    def _place_video(self, clip: Clip, grid: tuple[int, int, int], patches: np.ndarray | None) -> Placed:
        seen = len(self.frames(clip)) / clip.frames * clip.fps
        return Placed(pieces=(_START, self._item(grid, _VIDEO, patches), _END), seconds_per_grid=TEMPORAL_PATCH / seen)

    def with_limits(self, data: DataConfig) -> Self:
        """The same with the limits that `data` states."""
        return self._limited(data, frame_min_pixels=data.video_min_pixels, frame_max_pixels=data.video_max_pixels)

    def position_ids(self, length: int, items: Sequence[PlacedItem]) -> np.ndarray:
        """int64 `[position_rank, length]` of one document."""
        if self.position_rank == 1:
            return np.arange(length, dtype=np.int64)[None]
        return multimodal_positions(length, items, merge=self.merge_size, tokens_per_second=self.tokens_per_second)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Processor(QwenProcessor):
    """Qwen3-VL: a video is one item per time step, with its time stamp written before it."""

    clip_min_pixels: int = 4096
    clip_max_pixels: int = 25165824
    """Area of all chosen frames of a video together."""
    frame_min_pixels: int | None = None
    """Smallest area of one frame; clip_min_pixels alone decides when unset."""
    frame_max_pixels: int | None = None
    """Largest area of one frame, within its share of clip_max_pixels; that alone decides when unset."""

    def frames(self, clip: Clip) -> np.ndarray:
        """Indices int64 of frames at even steps, the first and the last one among them."""
        count = min(max(int(clip.frames / clip.fps * self.fps), self.min_frames), self.max_frames, clip.frames)
        return np.linspace(0, clip.frames - 1, count).round().astype(np.int64)

    def _frame_size(self, clip: Clip, count: int) -> tuple[int, int]:
        least = self.clip_min_pixels if self.frame_min_pixels is None else self.frame_min_pixels * count
        most = self.clip_max_pixels
        if self.frame_max_pixels is not None:
            share = min(self.frame_max_pixels, self.clip_max_pixels // count)
            most = max(share, int((self.frame_min_pixels or self.clip_min_pixels) * 1.05)) * count
        height, width, factor = clip.height, clip.width, self._factor
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        # A lone frame fills a patch by itself; the reference refuses such a video.
        even = max(round(count / TEMPORAL_PATCH), 1) * TEMPORAL_PATCH
        return _fit(height, width, factor, least, most, count=count, rounded_count=even)

    def _place_video(self, clip: Clip, grid: tuple[int, int, int], patches: np.ndarray | None) -> Placed:
        chosen = self.frames(clip)
        seconds = np.append(chosen, np.repeat(chosen[-1:], -len(chosen) % TEMPORAL_PATCH)) / clip.fps
        stamps = (seconds[::TEMPORAL_PATCH] + seconds[TEMPORAL_PATCH - 1 :: TEMPORAL_PATCH]) / 2
        parts = [None] * grid[0] if patches is None else np.split(patches, grid[0])
        pieces: list[str | VisualItem] = [_START]
        for stamp, part in zip(stamps.tolist(), parts, strict=True):
            pieces += [f"<{stamp:.1f} seconds>{_START}", self._item((1, *grid[1:]), _VIDEO, part), _END]
        return Placed(pieces=(*pieces, _END))

    def with_limits(self, data: DataConfig) -> Self:
        """The same with the limits that `data` states."""
        return self._limited(data, frame_min_pixels=data.video_min_pixels, frame_max_pixels=data.video_max_pixels)

    def position_ids(self, length: int, items: Sequence[PlacedItem]) -> np.ndarray:
        """int64 `[position_rank, length]` of one document."""
        if self.position_rank == 1:
            return np.arange(length, dtype=np.int64)[None]
        return multimodal_positions(length, items, merge=self.merge_size, tokens_per_second=1)


def qwen2_5_vl(model: ModelConfig) -> Qwen2_5Processor:
    """The processor of a Qwen2.5-VL composition, with the limits of the released models."""
    patch, merge, rank = _sizes(model)
    assert model.image_encoder is not None, "_sizes has looked"
    return Qwen2_5Processor(
        patch_size=patch,
        merge_size=merge,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        min_pixels=56 * 56,
        max_pixels=12845056,
        fps=2.0,
        min_frames=4,
        max_frames=768,
        position_rank=rank,
        tokens_per_second=model.image_encoder.geometry.tokens_per_second,
    )


def qwen3_vl(model: ModelConfig) -> Qwen3Processor:
    """The processor of a Qwen3-VL composition, with the limits of the released models."""
    patch, merge, rank = _sizes(model)
    return Qwen3Processor(
        patch_size=patch,
        merge_size=merge,
        mean=HALF,
        std=HALF,
        min_pixels=65536,
        max_pixels=16777216,
        fps=2.0,
        min_frames=4,
        max_frames=768,
        position_rank=rank,
    )


def _sizes(model: ModelConfig) -> tuple[int, int, int]:
    """Patch size, merge size, rows of position ids; `ConfigError` for an encoder of another build."""
    if model.image_encoder is None:
        raise ConfigError("model.image_encoder: a processor of images needs an encoder, the model has none.")
    encoder, foundation = model.image_encoder.geometry.geometry(), model.foundation.geometry.geometry()
    patch = math.isqrt(encoder.patch_dim // (CHANNELS * TEMPORAL_PATCH))
    if patch**2 * CHANNELS * TEMPORAL_PATCH != encoder.patch_dim:
        raise ConfigError(
            f"model.image_encoder: patches of {encoder.patch_dim} numbers are not {CHANNELS} channels x "
            f"{TEMPORAL_PATCH} frames x a square: use the processor that belongs to this encoder."
        )
    return patch, encoder.spatial_merge_size, foundation.position_rank


def _fit(
    height: int, width: int, factor: int, least: int, most: int, *, count: int = 1, rounded_count: int = 1
) -> tuple[int, int]:
    """Multiples of `factor` near a size of the same shape whose area, over `count` frames, is within the limits.

    A small size may stay below `least` or a long one above `most` by the rounding to multiples.
    """
    if max(height, width) / min(height, width) > EXTREME_ASPECT:
        raise DataError(f"{width}x{height} pixels: one side is more than {EXTREME_ASPECT} times the other.")
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if rounded_count * tall * wide > most:
        shrink = math.sqrt(count * height * width / most)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif rounded_count * tall * wide < least:
        grow = math.sqrt(least / (count * height * width))
        tall, wide = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return tall, wide


def _resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 `[H, W, 3]` to `[height, width, 3]`, bicubic."""
    if frame.shape[:2] == (height, width):
        return frame
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize((width, height), resample=Image.Resampling.BICUBIC))
