"""Files that rows name: where they are, how large, and what a shard calls them."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from loongforge.data.convert.messages import MediumKind
from loongforge.data.media import kind_of

_UNWANTED = re.compile(r"[\x00-\x1f\x7f/\\]")
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", ".jpg"), (0, b"\x89PNG", ".png"), (8, b"WEBP", ".webp"), (0, b"GIF8", ".gif"),
    (0, b"BM", ".bmp"), (0, b"II*\0", ".tif"), (0, b"MM\0*", ".tif"),
    (4, b"ftyp", ".mp4"), (0, b"\x1aE\xdf\xa3", ".mkv"), (8, b"AVI ", ".avi"),
)  # fmt: skip
"""Where a format writes its name into a file, for files whose own name does not say what they are."""


def resolve(kind: MediumKind, name: str, root: Path) -> tuple[str, int]:
    """Path and bytes of a file; `ValueError` when it is none, is empty, or when a relative path leads out of `root`."""
    plain = name.removeprefix("file://")
    if "://" in plain or plain.startswith("data:"):
        raise ValueError(f"{kind} {name[:60]!r}: only files are taken; download it and give its path.")
    if "\0" in plain:
        raise ValueError(f"{kind} {name!r}: a path holds no zero character.")
    if not os.path.isabs(plain) and os.path.normpath(plain).split(os.sep)[0] == "..":
        raise ValueError(f"{kind} {name!r} leads out of {root}.")
    path = os.path.join(root, plain)
    try:
        found = os.stat(path)
    except OSError as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(f"{kind} {name!r}: {why} ({path}).") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{kind} {name!r}: {path} is not a file.")
    if not found.st_size:
        raise ValueError(f"{kind} {name!r}: the file is empty ({path}).")
    return path, found.st_size


def suffix_of(kind: MediumKind, path: str) -> str:
    """The end of a file's name in small letters, or of its content where the name has none of its kind."""
    suffix = os.path.splitext(path)[1].lower()
    named = kind_of(f"x{suffix}")
    if named == kind:
        return suffix
    with open(path, "rb") as stream:
        head = stream.read(16)
    for at, mark, known in _MAGIC:
        if head[at:].startswith(mark) and kind_of(f"x{known}") == kind:
            return known
    raise ValueError(f"{kind} {path}: neither its name nor its first bytes are those of {kind}s that can be read.")


def part_name(place: int, path: str, suffix: str) -> str:
    """`<place>_<file name>`, in the small letters that webdataset makes of it anyway."""
    stem = _UNWANTED.sub("_", os.path.basename(path))
    stem = stem[: -len(suffix)] if stem.lower().endswith(suffix) else stem
    return f"{place}_{stem.lower()}{suffix}"
