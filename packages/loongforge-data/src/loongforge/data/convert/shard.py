"""Writing one shard: an archive, the offsets of its samples, and a record of what it holds."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tarfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from loongforge.core.errors import DataError
from loongforge.data.convert.check import check_image, check_video
from loongforge.data.convert.sample import Part, Sample

_BLOCK = 512
_RECORD = 20 * _BLOCK
"""An archive is filled up with zeros to a multiple of this."""
_COPY = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A row with something wrong."""

    row: int
    line: int | None
    key: str
    outcome: str
    """`skipped`: it is in no shard; `noted`: it is, and should be looked at."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """The rows of one shard. Its name, with its folder, says where it goes."""

    folder: Path
    name: str
    part: str
    samples: tuple[Sample, ...]

    @property
    def digest(self) -> str:
        """Of all that is known about the samples before a file is read."""
        digest = hashlib.blake2b(digest_size=16)
        for sample in self.samples:
            files = [(part.path, part.size, part.name) for part in sample.parts]
            digest.update(repr((sample.row, sample.key, sample.texts, files)).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """What a finished shard holds. Without samples there is no file."""

    name: str
    part: str
    rows: int
    samples: int
    images: int
    videos: int
    bytes: int
    sha256: str
    digest: str
    """Of the task it was written for."""
    findings: tuple[Finding, ...]

    @staticmethod
    def read(path: Path) -> ShardRecord | None:
        """The record in a file; None when there is none."""
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            return ShardRecord(**{**values, "findings": tuple(Finding(**one) for one in values["findings"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is damaged ({error}): delete it, its shard is written again.") from error


def record_path(folder: Path, name: str) -> Path:
    """Where the record of a shard lies."""
    return folder / ".loongforge" / "convert" / f"{name.replace('/', '.')}.json"


def write_shard(task: ShardTask, advance: Callable[[int], None]) -> ShardRecord:
    """Check and write the samples of a task; `advance` is told the input bytes of each row when it is done.

    Archive, offsets and record appear by renames, the record last. Bad files leave their row out, with a finding.
    """
    target = task.folder / task.name
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{target.name}.part-{os.getpid()}")  # an orphan of a killed run has another name
    findings: list[Finding] = []
    images = videos = 0
    with open(draft, "wb") as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata and sizes below the limit
        archive = _Archive(stream)
        for sample in task.samples:
            try:
                archive.add(sample, _contents(sample))
            except ValueError as error:
                findings.append(finding(sample, "skipped", str(error)))
            else:
                images += sum(1 for part in sample.parts if part.kind == "image")
                videos += sum(1 for part in sample.parts if part.kind == "video")
                if sample.note:
                    findings.append(finding(sample, "noted", sample.note))
            advance(sample.read)
        archive.close()
    samples = len(archive.offsets) - 1
    if samples:
        offsets = target.with_name(f"{target.name}.idx")
        index = offsets.with_name(f"{offsets.name}.part-{os.getpid()}")
        index.write_bytes(struct.pack(f"<{len(archive.offsets)}Q", *archive.offsets))
        os.replace(index, offsets)
        os.replace(draft, target)
    else:
        draft.unlink()
    record = ShardRecord(
        name=task.name,
        part=task.part,
        rows=len(task.samples),
        samples=samples,
        images=images,
        videos=videos,
        bytes=archive.size if samples else 0,
        sha256=archive.digest if samples else "",
        digest=task.digest,
        findings=tuple(findings),
    )
    write_text(record_path(task.folder, task.name), json.dumps(asdict(record)))
    return record


def archive_size(members: int) -> int:
    """Bytes of an archive whose members take so many: two empty blocks end it, and it is filled up."""
    return -(-(members + 2 * _BLOCK) // _RECORD) * _RECORD


def finding(sample: Sample, outcome: str, reason: str) -> Finding:
    """A finding about a sample."""
    return Finding(row=sample.row, line=sample.line, key=sample.key, outcome=outcome, reason=reason)


def write_text(path: Path, lines: str | Iterable[str]) -> None:
    """Write a file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part-{os.getpid()}")
    with open(draft, "w", encoding="utf-8") as stream:
        stream.writelines([lines] if isinstance(lines, str) else lines)
    os.replace(draft, path)


def _contents(sample: Sample) -> list[bytes | None]:
    """Checked bytes of the images, None for videos, which are copied; `ValueError` for one that cannot be used."""
    return [_content(part) for part in sample.parts]


def _content(part: Part) -> bytes | None:
    try:
        with open(part.path, "rb") as stream:
            if part.kind == "video":
                check_video(stream)
                return None
            content = stream.read()
            check_image(content)
            return content
    except OSError as error:
        raise ValueError(f"{part.kind} {part.path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ValueError(f"{part.kind} {part.path}: {error}.") from error


class _Archive:
    """A plain tar archive with nothing in its headers that differs between two runs."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.size = 0
        self.offsets: list[int] = []
        """Where samples begin and, once closed, where the last one ends: what Energon reads beside a shard."""

    @property
    def digest(self) -> str:
        """sha256 of the file."""
        return self._hash.hexdigest()

    def add(self, sample: Sample, contents: list[bytes | None]) -> None:
        """One sample; its json first, as it says what the others are."""
        self.offsets.append(self.size)
        for name, content in sample.texts:
            self._member(f"{sample.key}.{name}", content)
        for part, content in zip(sample.parts, contents, strict=True):
            if content is None:
                self._copy(f"{sample.key}.{part.name}", part)
            else:
                self._member(f"{sample.key}.{part.name}", content)

    def close(self) -> None:
        """Write the end mark, and wait until all is on the disk."""
        self.offsets.append(self.size)
        self._write(bytes(archive_size(self.size) - self.size))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _member(self, name: str, content: bytes) -> None:
        self._header(name, len(content))
        self._write(content)
        self._fill(len(content))

    def _copy(self, name: str, part: Part) -> None:
        self._header(name, part.size)
        left = part.size
        with open(part.path, "rb") as stream:
            while left and (chunk := stream.read(min(left, _COPY))):
                self._write(chunk)
                left -= len(chunk)
            if left or stream.read(1):
                raise DataError(f"{part.kind} {part.path} has changed during the conversion; start the command again.")
        self._fill(part.size)

    def _header(self, name: str, size: int) -> None:
        header = tarfile.TarInfo(name)
        header.size = size
        self._write(header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))

    def _fill(self, size: int) -> None:
        if rest := -size % _BLOCK:
            self._write(bytes(rest))

    def _write(self, content: bytes) -> None:
        self._stream.write(content)
        self._hash.update(content)
        self.size += len(content)
