"""What a conversion was asked for, and which of it the shards depend on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

from loongforge.core.errors import DataError

SampleType = Literal["vqa", "caption", "multi_mix_qa", "multi_vid_qa", "multi_vid_vqa", "chat_mix"]
MediaChoice = Literal["mix", "image", "video"]
SAMPLE_TYPES: tuple[str, ...] = get_args(SampleType)
MEDIA: tuple[str, ...] = get_args(MediaChoice)
PARTS = ("train", "val", "test")
"""Parts of a split, as Energon calls them."""
_FORMAT = 1
"""Raised when shards of an earlier version must not be taken up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Everything that decides the bytes of the shards."""

    json_file: Path
    """`.json` (a list), `.jsonl` or `.parquet`."""
    image_dir: Path
    """Where relative paths of images begin."""
    video_dir: Path
    sample_type: SampleType
    media: MediaChoice = "mix"
    """What rows may hold; text alone is always allowed."""
    columns_messages: str = "messages"
    key: Literal["id", "row"] = "id"
    """Samples are called after the row's `id` where it has one, or after its number."""
    maxcount: int = 10_000
    """Most rows of a shard."""
    maxsize: int = 3_000_000_000
    """Most bytes of a shard; a sample that is larger has one of its own."""
    split: str | None = None
    """Shares of train, val and test, as in `95,5,0`; None: all is train, without a folder of its own."""

    def __post_init__(self) -> None:
        if self.maxcount < 1 or self.maxsize < 1:
            raise DataError(f"--maxcount {self.maxcount} --maxsize {self.maxsize}: both must be 1 or more.")
        self.shares()

    def shares(self) -> list[float]:
        """Shares of `PARTS`, their sum 1; `DataError` for a malformed split."""
        if self.split is None:
            return [1.0, 0.0, 0.0]
        try:
            given = [float(share) for share in self.split.split(",")]
        except ValueError:
            given = []
        if not 0 < len(given) <= len(PARTS) or not all(0 <= share < float("inf") for share in given) or not sum(given):
            raise DataError(
                f"--split {self.split!r}: give up to three shares of train, val and test, not negative and not all 0, "
                "as in 95,5,0."
            )
        return [share / sum(given) for share in given] + [0.0] * (len(PARTS) - len(given))

    def folder(self, part: str) -> str:
        """Where shards of a part lie below the output, with a slash at the end."""
        return "" if self.split is None else f"{part}/"

    def identity(self) -> dict[str, Any]:
        """What must be equal for shards to be taken up again, by option; reads the whole input file once."""
        try:
            with open(self.json_file, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {self.json_file}: {error.strerror or error}.") from error
        return {
            "format": _FORMAT,
            "input": {"name": self.json_file.name, "bytes": os.path.getsize(self.json_file), "sha256": digest},
            "image_dir": str(self.image_dir),
            "video_dir": str(self.video_dir),
            "media": self.media,
            "columns_messages": self.columns_messages,
            "sample_type": self.sample_type,
            "key": self.key,
            "maxcount": self.maxcount,
            "maxsize": self.maxsize,
            "split": self.split,
        }


def part_of(key: str, shares: Sequence[float]) -> str:
    """The part a sample belongs to: a function of its key, so that more rows move none."""
    place = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
    for part, border in zip(PARTS, accumulate(shares), strict=True):
        if place < border:
            return part
    return max(zip(shares, PARTS, strict=True))[1]  # the sum of the shares may round to less than 1
