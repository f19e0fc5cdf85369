"""webdataset shards: plain tar archives whose members with one key form a sample. Nothing is ever extracted."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from loongforge.core.data.contract import Clip
from loongforge.core.errors import DataError
from loongforge.data.files import Files

_BLOCK = 512
_PADDING = 20 * _BLOCK
"""An archive's last record is filled up with zeros to this size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Where the bytes of a file lie in its shard."""

    extension: str
    """Name after the key: all that follows the first dot, as webdataset has it."""
    offset: int
    size: int
    extent: Clip | None = None
    """Of an image or a video, where an index has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSample:
    """The members of one key."""

    shard: str
    key: str
    members: tuple[Member, ...]

    def find(self, extension: str) -> Member | None:
        """The member of that extension."""
        return next((member for member in self.members if member.extension == extension), None)

    def read(self, member: Member, files: Files) -> bytes:
        """Bytes of a member, fewer where the archive ends in it."""
        return files.read(self.shard, member.offset, member.size)


Tell = Callable[[str, str], object]
"""Hears of a sample that cannot be used: `sample 7`, counted from 1 in its shard, and the reason."""


class CutOffError(DataError):
    """An archive ends before its end mark, or is damaged from there on."""


def shards_of(path: Path, endings: tuple[str, ...] = (".tar",)) -> list[Path]:
    """The shard itself, or all files of a directory with one of the endings by name; `DataError` when there is none."""
    if path.is_dir():
        found = sorted(one for one in path.iterdir() if one.name.endswith(endings))
        if not found:
            raise DataError(f"{path} holds no .tar file; a webdataset is a directory of them.")
        return found
    if not path.is_file():
        raise DataError(f"no file {path}.")
    return [path]


def read_index(shard: Path, tell: Tell | None = None) -> Iterator[ShardSample]:
    """Samples of a shard in the order they stand, from its headers alone.

    `tell` hears of every sample that cannot be used: one with a link or with a name that leads out of the archive, one
    whose key came before, one that is cut off, and those that a cut archive has lost; `<shard>.idx`, as Energon writes
    it, says how many there were. Without `tell` the first of them is a `DataError`. An archive of which nothing can be
    read, a compressed one above all, always is.
    """
    refuse = tell or _refuse(shard)
    seen: set[str] = set()
    found = 0
    try:
        size = os.path.getsize(shard)
        for group in _groups(shard):
            found += 1
            place, key = f"sample {found}", group.key
            if group.flaw:
                refuse(place, group.flaw)
            elif group.members[-1].offset + group.members[-1].size > size:
                refuse(place, f"key {key!r} is cut off with the archive at byte {size}.")
            elif key in seen:
                refuse(place, f"key {key!r} comes twice; the second sample would be lost.")
            else:
                seen.add(key)
                yield ShardSample(shard=str(shard), key=key, members=tuple(group.members))
    except CutOffError as error:
        planned = _planned(shard)
        if tell is None or (planned is None and not found):
            raise
        if planned is None:
            tell("the rest", f"lost behind {found} samples: {error} No {shard.name}.idx says how many there were.")
        for number in range(found, planned or 0):
            tell(f"sample {number + 1}", f"lost: {error} {shard.name}.idx says there were {planned} samples.")


def write_shards(
    samples: Iterable[tuple[str, Mapping[str, bytes]]], directory: str | Path, maxcount: int = 10000
) -> list[Path]:
    """Write samples, each a key and its members by extension, as `shard-000000.tar` and so on; returns the paths.

    A directory that holds shards already is refused, so that none of another run stays in between; so are keys with a
    dot or slash, and one that comes twice. Members keep their order.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise DataError(f"{folder} holds shards already: give an empty directory.")
    assert maxcount > 0, "a shard holds at least one sample"
    written: list[Path] = []
    archive: tarfile.TarFile | None = None
    seen: set[str] = set()
    try:
        for number, (key, members) in enumerate(samples):
            if not key or "." in key or "/" in key or key in seen:
                raise DataError(f"key {key!r}: keys are unique and have neither dot nor slash.")
            seen.add(key)
            if number % maxcount == 0:
                if archive is not None:
                    archive.close()
                written.append(folder / f"shard-{number // maxcount:06d}.tar")
                archive = tarfile.open(written[-1], "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  closed below
            assert archive is not None, "the first sample opens a shard"
            for extension, content in members.items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    finally:
        if archive is not None:
            archive.close()
    return written


def _refuse(shard: Path) -> Tell:
    def refuse(place: str, reason: str) -> None:
        raise DataError(f"{shard}: {place}: {reason}")

    return refuse


@dataclass(slots=True)
class _Group:
    """Neighbours of one key."""

    key: str
    members: list[Member] = field(default_factory=list)
    flaw: str = ""
    """Why one of them cannot be a member."""

    def has(self, extension: str) -> bool:
        """Whether a member has it."""
        return any(member.extension == extension for member in self.members)


def _groups(shard: Path) -> Iterator[_Group]:
    """Samples as they stand; an extension that comes again begins another one. A `CutOffError` comes after the last."""
    group: _Group | None = None
    cut: CutOffError | None = None
    try:
        for key, member in _members(shard):
            if group is None or group.key != key or (isinstance(member, Member) and group.has(member.extension)):
                if group is not None:
                    yield group
                group = _Group(key)
            if isinstance(member, Member):
                group.members.append(member)
            else:
                group.flaw = group.flaw or member
    except CutOffError as error:
        cut = error
    if group is not None:
        yield group
    if cut is not None:
        raise cut


def _planned(shard: Path) -> int | None:
    """Samples that a shard had when `<shard>.idx` was written: little-endian u64 offsets, the last one its end."""
    index = shard.with_name(f"{shard.name}.idx")
    return max(0, index.stat().st_size // 8 - 1) if index.is_file() else None


def _members(shard: Path) -> Iterator[tuple[str, Member | str]]:
    """Key and place of every file in the archive, or why it cannot be a member."""
    behind = 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for header in archive:
                behind = header.offset
                if header.isdir() or PurePosixPath(header.name).name.startswith("__"):  # webdataset's own notes
                    continue
                yield _checked(header)
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  or it would remember every header
            _check_end(shard, archive.offset)
    except tarfile.ReadError as error:
        raise CutOffError(
            f"{shard}: not a whole plain tar archive ({error} behind byte {behind}). It may be cut off or compressed: "
            "shards are read at random, so they are not compressed."
        ) from error
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read {shard}: {error}.") from error


def _checked(header: tarfile.TarInfo) -> tuple[str, Member | str]:
    path = PurePosixPath(header.name)
    stem, dot, extension = path.name.partition(".")
    key = str(path.with_name(stem)) if stem else header.name
    if path.is_absolute() or ".." in path.parts:
        return key, f"member {header.name!r} leads out of the archive."
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return key, f"member {header.name!r} is a link or a special file; only files hold data."
    if not stem or not dot:
        return key, f"member {header.name!r} is not KEY.EXTENSION."
    return key, Member(extension=extension, offset=header.offset_data, size=header.size)


def _check_end(shard: Path, end: int) -> None:
    """The archive must close with zero blocks, and nothing may follow them."""
    with open(shard, "rb") as stream:
        stream.seek(end)
        if stream.read(_BLOCK).strip(b"\0") or end + _BLOCK > os.path.getsize(shard):
            raise CutOffError(f"{shard}: the archive has no end mark at byte {end}: it is cut off or damaged there.")
        rest = os.path.getsize(shard) - end
        if rest > _PADDING:
            while chunk := stream.read(1 << 20):
                if chunk.strip(b"\0"):
                    raise DataError(f"{shard}: something follows the end of the archive; were two of them joined?")
