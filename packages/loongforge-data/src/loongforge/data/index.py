"""The offset index of a shard: where every member lies and how large its picture is, found once and kept.

    <folder>/.loongforge/index/<shard>.npz       columns of numpy arrays, one row a member

It depends on the shard alone: another tokenizer, template or model reads no archive and no picture again. The file is
that of a shard of its size and time of change, or it is built anew; it appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from loongforge.core.data.contract import Clip
from loongforge.core.errors import DataError
from loongforge.data.media import Kind, Medium, MissingLibraryError, extent_of, kind_of
from loongforge.data.once import locked
from loongforge.data.progress import progress
from loongforge.data.shards import Member, ShardSample, read_index
from loongforge.data.tokenise import in_order

FORMAT = 1
"""Raised when an index of an earlier version must not be read."""
_KINDS: tuple[Kind | None, ...] = (None, "image", "video", "audio")
_PARALLEL_BYTES = 1 << 30
"""Bytes of shards from which on processes are worth their start: headers are a small part of an archive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A sample of a shard that cannot be used."""

    place: str
    """`sample 7`, counted from 1."""
    reason: str


class ShardIndex:
    """Samples of one shard by number, from its index file."""

    def __init__(self, shard: Path, columns: dict[str, np.ndarray]) -> None:
        self.shard = shard
        self._path = str(shard)
        self._ends = columns["member_ends"]
        self._key_ends = columns["key_ends"]
        self._keys = columns["keys"].tobytes()
        self._extensions: list[str] = json.loads(columns["extensions"].tobytes())
        self._columns = columns
        self.problems = [Problem(place=place, reason=reason) for place, reason in _list(columns["problems"])]
        """Samples that cannot be used; they have no number."""

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> ShardSample:
        """One sample."""
        first, last = self._border(self._ends, number), int(self._ends[number])
        rows = zip(*(self._columns[name][first:last].tolist() for name in _MEMBER), strict=True)
        members = tuple(self._member(*row) for row in rows)
        return ShardSample(shard=self._path, key=self.key(number), members=members)

    def __iter__(self) -> Iterator[ShardSample]:
        return (self[number] for number in range(len(self)))

    def key(self, number: int) -> str:
        """The key of a sample."""
        start = self._border(self._key_ends, number)
        return self._keys[start : int(self._key_ends[number])].decode("utf-8", "surrogateescape")

    @staticmethod
    def _border(ends: np.ndarray, number: int) -> int:
        return int(ends[number - 1]) if number else 0

    def _member(self, *row: Any) -> Member:
        extension, offset, size, _, height, width, frames, fps = row
        extent = Clip(frames=frames, fps=fps, height=height, width=width) if frames else None
        return Member(extension=self._extensions[extension], offset=offset, size=size, extent=extent)


_MEMBER: dict[str, Any] = {
    "extension": np.uint32,
    "offset": np.int64,
    "size": np.int64,
    "kind": np.uint8,
    "height": np.int32,
    "width": np.int32,
    "frames": np.int32,
    "fps": np.float64,
}
"""Columns of members; `frames` 0: no extent is known."""
_NONE = Clip(frames=0, fps=0.0, height=0, width=0)


def open_indices(shards: Sequence[Path], cache: Path, workers: int | None = None) -> Iterator[ShardIndex]:
    """The index of every shard, in order; those that are absent or out of date are built first, side by side.

    They lie beside their shard, or in `cache` where its folder cannot be written. Of several processes one builds, and
    the others wait for it. `DataError` as `read_index` has it.
    """
    pairs = [(shard, _file(shard, cache)) for shard in shards]
    if _missing(pairs):
        with ExitStack() as stack:
            for folder in sorted({file.parent for _, file in pairs}):
                stack.enter_context(locked(folder / "index", wait=True))
            _build(_missing(pairs), workers)
    for shard, file in pairs:
        columns = _load(shard, file)
        if columns is None:
            raise DataError(f"{shard} was changed while it was indexed: {file} is not its index. Start again.")
        yield ShardIndex(shard, columns)


def glance(shard: Path) -> ShardIndex:
    """The index beside a shard, or one made now, of headers of the archive alone, that is not kept."""
    known = _load(shard, _beside(shard))
    if known is None:
        with np.load(io.BytesIO(_built(shard, _stamp(shard), measured=False))) as made:
            known = {name: made[name] for name in made.files}
    return ShardIndex(shard, known)


def _missing(pairs: Sequence[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    return [(shard, file) for shard, file in pairs if not _is_current(shard, file)]


def _build(missing: list[tuple[Path, Path]], workers: int | None) -> None:
    if not missing:
        return
    total = sum(shard.stat().st_size for shard, _ in missing)
    spare = min(8, len(os.sched_getaffinity(0)), len(missing)) if total > _PARALLEL_BYTES else 0
    with progress(f"indexing {len(missing)} shards", total) as advance:
        for done in in_order(_Indexer, (), missing, spare if workers is None else workers):
            advance(done)


class _Indexer:
    """Builds index files; works in any process."""

    def __call__(self, pair: tuple[Path, Path]) -> int:
        """Bytes of the shard that was indexed."""
        shard, file = pair
        stamp = _stamp(shard)
        temporary = file.with_name(f".{file.name}.writing-{os.getpid()}")
        try:
            temporary.write_bytes(_built(shard, stamp))
            os.replace(temporary, file)
        except OSError as error:
            raise DataError(f"cannot write {file}: {error.strerror or error}. Give --data-cache-path DIR.") from error
        finally:
            temporary.unlink(missing_ok=True)
        return stamp[1]


def _built(shard: Path, stamp: tuple[int, ...], *, measured: bool = True) -> bytes:
    """An index file's content; pictures have no size where they are not measured."""
    columns: dict[str, list[Any]] = {name: [] for name in _MEMBER}
    problems: list[tuple[str, str]] = []
    extensions: dict[str, int] = {}
    keys = io.BytesIO()
    key_ends: list[int] = []
    ends: list[int] = []
    for sample in read_index(shard, lambda place, reason: problems.append((place, reason))):
        keys.write(sample.key.encode("utf-8", "surrogateescape"))
        key_ends.append(keys.tell())
        for member in sample.members:
            kind = kind_of(f"x.{member.extension}")
            extent = _extent(sample, member, kind) if measured else _NONE
            row = (extensions.setdefault(member.extension, len(extensions)), member.offset, member.size)
            row += (_KINDS.index(kind), extent.height, extent.width, extent.frames, extent.fps)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
        ends.append(len(columns["size"]))
    arrays: dict[str, Any] = {
        "stamp": np.array(stamp, dtype=np.int64),
        "keys": np.frombuffer(keys.getvalue(), dtype=np.uint8),
        "key_ends": np.array(key_ends, dtype=np.int64),
        "member_ends": np.array(ends, dtype=np.int64),
        "extensions": _bytes(list(extensions)),
        "problems": _bytes(problems),
        **{name: np.array(values, dtype=_MEMBER[name]) for name, values in columns.items()},
    }
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def _extent(sample: ShardSample, member: Member, kind: Kind | None) -> Clip:
    """Size of a picture, nothing of anything else; what cannot be measured is named by whoever wants to use it."""
    if kind in ("image", "video"):
        name = f"{sample.key}.{member.extension}"
        medium = Medium(kind=kind, path=sample.shard, offset=member.offset, size=member.size, name=name)
        try:
            return extent_of(medium)
        except MissingLibraryError:
            raise
        except DataError:
            pass
    return _NONE


def _stamp(shard: Path) -> tuple[int, int, int, int]:
    """What an index belongs to; `<shard>.idx` says what a shard that was cut off has lost."""
    status, offsets = shard.stat(), shard.with_name(f"{shard.name}.idx")
    return FORMAT, status.st_size, status.st_mtime_ns, offsets.stat().st_size if offsets.is_file() else 0


def _load(shard: Path, file: Path) -> dict[str, np.ndarray] | None:
    """Columns of an index file; None when it is absent, damaged, or that of another state of the shard."""
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            if tuple(stored["stamp"].tolist()) != _stamp(shard):
                return None
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _is_current(shard: Path, file: Path) -> bool:
    return _load(shard, file) is not None


def _file(shard: Path, cache: Path) -> Path:
    """Where the index of a shard lies: beside it if it is there or can be written there, in the cache otherwise."""
    beside = _beside(shard)
    if _is_current(shard, beside):
        return beside
    with suppress(OSError):
        beside.parent.mkdir(parents=True, exist_ok=True)
    if os.access(beside.parent, os.W_OK):
        return beside
    digest = hashlib.blake2b(os.path.realpath(shard.parent).encode(), digest_size=8).hexdigest()
    other = cache / f"index-{digest}"
    try:
        other.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {other}: {error.strerror or error}. Give --data-cache-path DIR.") from error
    return other / beside.name


def _beside(shard: Path) -> Path:
    return shard.parent / ".loongforge" / "index" / f"{shard.name}.npz"


def _bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def _list(content: np.ndarray) -> list[Any]:
    return json.loads(content.tobytes())
