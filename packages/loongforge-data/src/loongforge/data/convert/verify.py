"""Shards against the manifest of their conversion."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from loongforge.core.errors import DataError
from loongforge.data.convert.folder import MANIFEST
from loongforge.data.progress import progress
from loongforge.data.shards import read_index


def verify(folder: Path) -> dict[str, int]:
    """Read every shard again; returns the totals of the manifest, `DataError` with every difference there is."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        shards, totals = manifest["shards"], manifest["totals"]
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no {MANIFEST}: it is no finished output of convert-to-webdataset.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read: {error}.") from error
    problems: list[str] = []
    with progress(f"verifying {folder.name}", totals["bytes"]) as advance:
        for shard in shards:
            problems += _differences(folder / shard["name"], shard)
            advance(shard["bytes"])
    known = {folder / shard["name"] for shard in shards}
    problems += [f"{path} is not in the manifest." for path in sorted(folder.rglob("*.tar")) if path not in known]
    if sum(shard["samples"] for shard in shards) != totals["written"]:
        problems.append(f"{folder / MANIFEST}: the samples of its shards are not the {totals['written']} it counts.")
    if problems:
        raise DataError(*problems)
    return totals


def _differences(path: Path, shard: dict[str, Any]) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing."]
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != shard["sha256"]:
        size = path.stat().st_size
        return [f"{path} is damaged: {size} bytes, sha256 {digest}; written were {shard['bytes']}, {shard['sha256']}."]
    samples = sum(1 for _ in read_index(path))
    if samples != shard["samples"]:
        return [f"{path} holds {samples} samples, the manifest says {shard['samples']}."]
    index = path.with_name(f"{path.name}.idx")
    try:
        offsets = struct.unpack(f"<{samples + 1}Q", index.read_bytes())
    except (OSError, struct.error) as error:
        return [f"{index} is not a list of {samples + 1} offsets: {error}."]
    return [] if list(offsets) == sorted(offsets) and offsets[0] == 0 else [f"{index} holds offsets out of order."]
