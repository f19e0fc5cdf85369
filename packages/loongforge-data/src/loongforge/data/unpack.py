"""Shards without random access: a compressed archive is read once, as a stream, into the cache."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from loongforge.core.errors import DataError
from loongforge.data.once import build_once
from loongforge.data.progress import progress
from loongforge.data.row_files import stamps

_OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tar.xz": lzma.open,
}
COMPRESSED = tuple(_OPENERS)
"""Endings of compressed shards."""
_COPY = 1 << 20
_SMALL = 1 << 30
"""Bytes that any shard may grow to."""
_MOST = 100
"""Times its own size that a larger one may: pictures do not compress, and a bomb does by a thousand."""


def is_compressed(path: Path) -> bool:
    """By its name."""
    return path.name.endswith(COMPRESSED)


def unpacked(shards: Sequence[Path], cache: Path, *, is_builder: bool, barrier: Callable[[], object]) -> list[Path]:
    """The shards, with a plain copy in the cache in place of every compressed one. Collective where there are any.

    `DataError` for one that is damaged, cut off or grows beyond all measure.
    """
    return [_unpacked(one, cache, is_builder, barrier) if is_compressed(one) else one for one in shards]


def _unpacked(shard: Path, cache: Path, is_builder: bool, barrier: Callable[[], object]) -> Path:
    stamp = hashlib.blake2b(repr(stamps([shard])).encode(), digest_size=6).hexdigest()
    ending = next(ending for ending in COMPRESSED if shard.name.endswith(ending))
    target = cache / "unpacked" / f"{shard.name.removesuffix(ending)}-{stamp}.tar"
    build_once(target, lambda: _unpack(shard, ending, target), is_builder=is_builder, barrier=barrier)
    return target


def _unpack(shard: Path, ending: str, target: Path) -> None:
    temporary = target.with_name(f"{target.name}.writing-{os.getpid()}")
    size = shard.stat().st_size
    try:
        with (
            progress(f"unpacking {shard.name}", size) as advance,
            open(shard, "rb") as packed,
            open(temporary, "wb") as plain,
        ):
            _copy(shard, _OPENERS[ending](packed), plain, max(_SMALL, _MOST * size), lambda: packed.tell(), advance)
        os.replace(temporary, target)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{shard}: cannot be unpacked ({error}): it is damaged or cut off.") from error
    except OSError as error:
        raise DataError(f"cannot unpack {shard} to {temporary}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _copy(
    shard: Path, stream: Any, plain: IO[bytes], most: int, place: Callable[[], int], advance: Callable[[int], None]
) -> None:
    written = told = 0
    while chunk := stream.read(_COPY):
        written += len(chunk)
        if written > most:
            raise DataError(f"{shard} grows beyond {most} bytes when it is unpacked, {_MOST} times its own: refused.")
        plain.write(chunk)
        advance(place() - told)
        told = place()
