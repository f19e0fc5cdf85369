"""Images, videos and sounds out of files: sizes from headers, pixels when they are asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np

from loongforge.core.data.contract import Clip, Placed, SoundProcessor, VisualProcessor
from loongforge.core.errors import DataError
from loongforge.data.files import Files

INSTALL = "pip install 'loongforge-data[vision]'"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac")
_ORIENTATION = 0x0112
"""EXIF tag."""
_SIDEWAYS = 5
"""Orientations from this one on exchange height and width."""

MAX_IMAGE_PIXELS = 178_956_970
"""Where Pillow, too, takes an image for a bomb. A header may say anything."""
MAX_FRAME_PIXELS = 8192 * 8192
MAX_FRAMES = 10_000_000
"""Four days of video at 30 frames a second."""
MAX_FPS = 1000
_WASTE = 1 << 16
"""Bytes that may lie between members that are read at once."""

Kind = Literal["image", "video", "audio"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Medium:
    """An image, a video or a sound: a file, or `size` bytes of an archive from `offset` on."""

    kind: Kind
    path: str
    offset: int = 0
    size: int | None = None
    """None: the file as a whole."""
    name: str = ""
    """What the archive calls it."""
    extent: Clip | None = None
    """Of an image or a video, where an index has it: its header need not be read again."""

    def __str__(self) -> str:
        """As messages name it."""
        return f"{self.kind} {self.path}" if self.size is None else f"{self.kind} {self.name} in {self.path}"

    @contextmanager
    def open(self, content: bytes | None = None) -> Iterator[BinaryIO]:
        """Its bytes as a file, read as far as somebody asks; `DataError` when it is absent or cut off.

        `content` are its bytes where they have been read.
        """
        if content is not None:
            yield io.BytesIO(content)
            return
        try:
            with open(self.path, "rb", buffering=0) as stream:
                if self.size is not None and os.fstat(stream.fileno()).st_size < self.offset + self.size:
                    raise DataError(f"{self}: the archive ends inside it; it is cut off.")
                size = os.fstat(stream.fileno()).st_size if self.size is None else self.size
                yield io.BufferedReader(_Window(stream.fileno(), self.offset, size))
        except FileNotFoundError as error:
            raise DataError(f"{self}: there is no such file.") from error


class MissingLibraryError(DataError):
    """The library that reads a kind of medium is not installed."""


class _Window(io.RawIOBase):
    """Some bytes of an open file as a file of their own."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self._descriptor, self._offset, self._size = descriptor, offset, size
        self._place = 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It has a position."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the window goes."""
        wanted = max(0, min(len(buffer), self._size - self._place))
        content = os.pread(self._descriptor, wanted, self._offset + self._place)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position of the window."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def tell(self) -> int:
        """The position."""
        return self._place


def kind_of(name: str) -> Kind | None:
    """Image, video or audio, by the end of a file's name; None for anything else."""
    ends: dict[Kind, tuple[str, ...]] = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES, "audio": AUDIO_SUFFIXES}
    return next((kind for kind, suffixes in ends.items() if name.lower().endswith(suffixes)), None)


def extent_of(medium: Medium) -> Clip:
    """Size of an image, one frame, or of a video, from its header alone; `DataError` when it cannot be read or used."""
    if medium.kind == "video":
        with _stream(medium) as (container, stream):
            return _clip(medium, container, stream)
    with _image(medium) as image:
        width, height = image.size
        _check_area(medium, height, width, MAX_IMAGE_PIXELS)
        if _orientation(image) >= _SIDEWAYS:
            width, height = height, width
    return Clip(frames=1, fps=0.0, height=height, width=width)


def measure(medium: Medium, processor: VisualProcessor) -> Placed:
    """What a medium becomes, an image or a video from its header alone; `DataError` when it cannot be read or used.

    A sound is decoded, which is cheap: the headers of compressed ones are wrong by some samples.
    """
    if medium.kind == "audio":
        hears = _hearing(medium, processor)
        return hears.sound_size(len(_samples(medium, hears.sampling_rate)))
    extent = medium.extent or extent_of(medium)
    if medium.kind == "video":
        return processor.video_size(extent)
    return processor.image_size(extent.height, extent.width)


def contents(media: Sequence[Medium], files: Files) -> list[bytes | None]:
    """Bytes of each medium; members of one archive that lie close together are one read. `DataError` for one cut off.

    None of a video, which is read as far as its frames are wanted, and of a file that is no archive.
    """
    inside = [one for one in media if one.size is not None and one.kind != "video"]
    if not inside:
        return [None] * len(media)
    first = min(one.offset for one in inside)
    sizes = [one.size or 0 for one in inside]
    last = max(one.offset + size for one, size in zip(inside, sizes, strict=True))
    together = all(one.path == inside[0].path for one in inside) and last - first <= sum(sizes) + _WASTE * len(inside)
    whole = _read(inside[0], files, first, last - first) if together else b""
    found: list[bytes | None] = []
    for one in media:
        if one.size is None or one.kind == "video":
            found.append(None)
            continue
        start = one.offset - first
        content = whole[start : start + one.size] if together else _read(one, files, one.offset, one.size)
        if len(content) < one.size:
            raise DataError(f"{one}: the archive ends inside it; it is cut off.")
        found.append(content)
    return found


def _read(medium: Medium, files: Files, offset: int, size: int) -> bytes:
    try:
        return files.read(medium.path, offset, size)
    except OSError as error:
        raise DataError(f"{medium}: cannot read {medium.path}: {error.strerror or error}.") from error


def decode(medium: Medium, processor: VisualProcessor, content: bytes | None = None) -> Placed:
    """What a medium becomes, with its patches; `DataError` when it is corrupt. `content`: see `contents`."""
    if medium.kind == "audio":
        hears = _hearing(medium, processor)
        return hears.sound(_samples(medium, hears.sampling_rate, content))
    if medium.kind == "video":
        return _decode_video(medium, processor)
    from PIL import ImageOps

    with _image(medium, content) as image:
        _check_area(medium, image.height, image.width, MAX_IMAGE_PIXELS)
        upright = ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
        pixels = np.asarray(upright.convert("RGB"))
    return processor.image(pixels)


def _decode_video(medium: Medium, processor: VisualProcessor) -> Placed:
    with _stream(medium) as (container, stream):
        from av.video.reformatter import VideoReformatter

        # Of its own, on one thread. PyAV keeps one for a process, and libswscale's threads in it do not survive a fork:
        # this process would wait for those of its parent for ever, and a process forked later for its own. Loader
        # workers are the parallelism here.
        colours = VideoReformatter()
        clip = _clip(medium, container, stream)
        wanted = processor.frames(clip)
        chosen: list[np.ndarray] = []
        for number, frame in enumerate(container.decode(stream)):
            if number == wanted[len(chosen)]:
                if (frame.height, frame.width) != (clip.height, clip.width):
                    raise DataError(
                        f"{medium}: frame {number} is {frame.width} x {frame.height}, its header says "
                        f"{clip.width} x {clip.height}."
                    )
                chosen.append(colours.reformat(frame, format="rgb24", threads=1).to_ndarray())
                if len(chosen) == len(wanted):
                    break
    if len(chosen) < len(wanted):
        raise DataError(f"{medium}: it says {clip.frames} frames and ends before frame {int(wanted[len(chosen)])}.")
    return processor.video(clip, np.stack(chosen))


def _check_area(medium: Medium, height: int, width: int, most: int) -> None:
    """`DataError` for a picture whose header says more than `most` pixels, or none; before any is decoded."""
    if not 0 < height * width <= most:
        raise DataError(f"{medium}: its header says {width} x {height} pixels, at most {most} are taken.")


def _hearing(medium: Medium, processor: VisualProcessor) -> SoundProcessor:
    if not isinstance(processor, SoundProcessor):
        raise DataError(f"{medium}: this model's composition prepares no sounds; take them out of the data.")
    return processor


def _samples(medium: Medium, rate: int, content: bytes | None = None) -> np.ndarray:
    """float32 `[samples]`: the mean of all channels, at `rate` a second."""
    with _stream(medium, content) as (container, stream):
        from av import AudioResampler

        resampler = AudioResampler(format="fltp", rate=rate)  # its own way to one channel makes two equal ones louder
        frames = [*container.decode(stream), None]  # None: what the filter still holds
        parts = [part.to_ndarray().mean(axis=0) for frame in frames for part in resampler.resample(frame)]
    if not parts:
        raise DataError(f"{medium}: a sound without samples.")
    return np.concatenate(parts)


@contextmanager
def _image(medium: Medium, content: bytes | None = None) -> Iterator[Any]:
    """An opened Pillow image, not decoded yet."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingLibraryError(f"{medium}: images need Pillow: {INSTALL}") from error
    try:
        with medium.open(content) as stream, Image.open(stream) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's decoders raise
        raise DataError(f"{medium}: not a readable image: {error}.") from error


def _orientation(image: Any) -> int:
    """The EXIF orientation, 1 (upright) to 8. In a PNG one behind the pixels, which is rare, is not looked for."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return image.getexif().get(_ORIENTATION, 1)


@contextmanager
def _stream(medium: Medium, content: bytes | None = None) -> Iterator[tuple[Any, Any]]:
    """An opened PyAV container and its first stream of the medium's kind."""
    try:
        import av
    except ImportError as error:
        raise MissingLibraryError(f"{medium}: videos and sounds need PyAV: {INSTALL}") from error
    try:
        with medium.open(content) as stream, av.open(stream) as container:
            found = container.streams.video if medium.kind == "video" else container.streams.audio
            if not found:
                raise DataError(f"{medium}: it holds no {medium.kind} stream.")
            yield container, found[0]
    except (OSError, ValueError, av.FFmpegError) as error:
        raise DataError(f"{medium}: not a readable {medium.kind}: {error}.") from error


def _clip(medium: Medium, container: Any, stream: Any) -> Clip:
    frames = stream.frames
    if not frames:  # some containers do not say; packets are counted without decoding
        frames = sum(1 for packet in container.demux(stream) if packet.size)
        container.seek(0)
    if not frames or not stream.average_rate:
        raise DataError(f"{medium}: a video without frames or without a frame rate.")
    clip = Clip(frames=frames, fps=float(stream.average_rate), height=stream.height, width=stream.width)
    _check_area(medium, clip.height, clip.width, MAX_FRAME_PIXELS)
    if not (0 < clip.frames <= MAX_FRAMES and 0 < clip.fps <= MAX_FPS):
        raise DataError(
            f"{medium}: its header says {clip.frames} frames, {clip.fps:g} a second; at most {MAX_FRAMES}, "
            f"{MAX_FPS} a second, are taken."
        )
    return clip
