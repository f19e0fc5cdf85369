"""webdataset shards: plain tar archives whose members with one key form a sample. Nothing is ever extracted."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loongforge.core.errors import DataError

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSample:
    """The members of one key."""

    shard: str
    key: str
    members: tuple[Member, ...]

    def find(self, extension: str) -> Member | None:
        """The member of that extension."""
        return next((member for member in self.members if member.extension == extension), None)

    def read(self, member: Member) -> bytes:
        """Bytes of a member."""
        with open(self.shard, "rb") as stream:
            return os.pread(stream.fileno(), member.size, member.offset)


def shards_of(path: Path) -> list[Path]:
    """The shard itself, or all `.tar` files of a directory by name; `DataError` when there is none."""
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            raise DataError(f"{path} holds no .tar file; a webdataset is a directory of them.")
        return found
    if not path.is_file():
        raise DataError(f"no file {path}.")
    return [path]


def read_index(shard: Path) -> Iterator[ShardSample]:
    """Samples of a shard in the order they stand, from its headers alone.

    `DataError` for an archive that is compressed, cut off or damaged, for links, for names that lead out of it, and
    for a key that comes twice.
    """
    seen: set[str] = set()
    key: str | None = None
    members: list[Member] = []
    for name, member in _members(shard):
        if name != key:
            if key is not None:
                yield _sample(shard, key, members)
            if name in seen:
                raise DataError(f"{shard}: key {name!r} comes twice; the second sample would be lost.")
            seen.add(name)
            key, members = name, []
        members.append(member)
    if key is not None:
        yield _sample(shard, key, members)


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


def _sample(shard: Path, key: str, members: list[Member]) -> ShardSample:
    names = [member.extension for member in members]
    if len(set(names)) < len(names):
        raise DataError(f"{shard}: key {key!r} has a member twice: {', '.join(names)}.")
    return ShardSample(shard=str(shard), key=key, members=tuple(members))


def _members(shard: Path) -> Iterator[tuple[str, Member]]:
    """Key and place of every file in the archive."""
    try:
        with tarfile.open(shard, "r:") as archive:
            for header in archive:
                if header.isdir() or PurePosixPath(header.name).name.startswith("__"):  # webdataset's own notes
                    continue
                yield _checked(shard, header)
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  or it would remember every header
            _check_end(shard, archive.offset)
    except tarfile.ReadError as error:
        raise DataError(
            f"{shard}: not a whole plain tar archive ({error}). It may be cut off or compressed: shards are read at "
            "random, so they are not compressed."
        ) from error
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read {shard}: {error}.") from error


def _checked(shard: Path, header: tarfile.TarInfo) -> tuple[str, Member]:
    path = PurePosixPath(header.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{shard}: member {header.name!r} leads out of the archive.")
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise DataError(f"{shard}: member {header.name!r} is a link or a special file; only files hold data.")
    stem, dot, extension = path.name.partition(".")
    if not stem or not dot:
        raise DataError(f"{shard}: member {header.name!r} is not KEY.EXTENSION.")
    return str(path.with_name(stem)), Member(extension=extension, offset=header.offset_data, size=header.size)


def _check_end(shard: Path, end: int) -> None:
    """The archive must close with zero blocks, and nothing may follow them."""
    with open(shard, "rb") as stream:
        stream.seek(end)
        if stream.read(_BLOCK).strip(b"\0") or end + _BLOCK > os.path.getsize(shard):
            raise DataError(f"{shard}: the archive has no end mark: it is cut off.")
        rest = os.path.getsize(shard) - end
        if rest > _PADDING:
            while chunk := stream.read(1 << 20):
                if chunk.strip(b"\0"):
                    raise DataError(f"{shard}: something follows the end of the archive; were two of them joined?")
