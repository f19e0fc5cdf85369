"""Whether an image or a video can be read, and is not absurdly large."""

from __future__ import annotations

import io
import struct
import zlib
from typing import BinaryIO

from loongforge.core.errors import DataError
from loongforge.data.media import INSTALL, MAX_FPS, MAX_FRAME_PIXELS, MAX_FRAMES, MAX_IMAGE_PIXELS

_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def check_image(content: bytes) -> None:
    """Decode an image; `ValueError` says why it cannot be used, before any pixel where its header is absurd.

    A JPEG is decoded at an eighth of its size: every coded byte is read, and a fifth of the time is spent.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"images need Pillow: {INSTALL}") from error
    try:
        with Image.open(io.BytesIO(content), formats=_IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{width} x {height} pixels, at most {MAX_IMAGE_PIXELS} are taken")
            image.draft("L", (max(1, width // 8), max(1, height // 8)))
            image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"an image with more than {MAX_IMAGE_PIXELS} pixels: {error}") from error
    # What Pillow's decoders raise on damaged data, ImageFile.load's own errors among them.
    except (OSError, SyntaxError, ArithmeticError, LookupError, TypeError, EOFError, struct.error, zlib.error) as error:
        said = "no JPEG, PNG, WebP, BMP, GIF or TIFF" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(f"not a readable image: {said}") from error


def check_video(stream: BinaryIO) -> None:
    """Read the header of a video; `ValueError` says why it cannot be used. No frame is decoded."""
    try:
        import av
    except ImportError as error:
        raise DataError(f"videos need PyAV: {INSTALL}") from error
    try:
        with av.open(stream, mode="r") as container:
            if not container.streams.video:
                raise ValueError("it holds no video stream")
            video = container.streams.video[0]
            width, height, rate, frames = video.width, video.height, video.average_rate, video.frames
            if not frames:  # some containers do not say; packets are counted without decoding
                frames = sum(1 for packet in container.demux(video) if packet.size)
    except (OSError, av.FFmpegError) as error:
        raise ValueError(f"not a readable video: {error}") from error
    if not frames or not rate or not width or not height:
        raise ValueError("a video without frames, frame rate, width or height")
    if width * height > MAX_FRAME_PIXELS or frames > MAX_FRAMES or not 0 < rate <= MAX_FPS:
        raise ValueError(
            f"its header says {frames} frames of {width} x {height} pixels, {float(rate):g} a second; at most "
            f"{MAX_FRAMES} of {MAX_FRAME_PIXELS} pixels, {MAX_FPS} a second, are taken"
        )
