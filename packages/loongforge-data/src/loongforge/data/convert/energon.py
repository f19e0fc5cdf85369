"""What Energon wants to know of a folder of shards, in its own files. It is not needed to write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loongforge.data.convert.options import PARTS
from loongforge.data.convert.shard import ShardRecord, write_text

META = ".nv-meta"
_IMAGES = "jpg,png,webp,bmp,gif,tif"
"""Energon takes the first of these extensions that a sample has."""


def write_metadata(folder: Path, sample_type: str, records: Sequence[ShardRecord]) -> None:
    """`dataset.yaml`, `split.yaml` and the counts of each shard, in the form of Energon 5 and of 7.

    JSON is YAML, so nothing but the standard library writes them.
    """
    counts = {"shard_counts": {record.name: record.samples for record in records}}
    parts = {part: [record.name for record in records if record.part == part] for part in PARTS}
    files: dict[str, dict[str, Any]] = {
        "dataset.yaml": _dataset(sample_type),
        "split.yaml": {"exclude": [], "split_parts": parts},
        ".info.yaml": counts,
        ".info.json": counts,
    }
    for name, content in files.items():
        write_text(folder / META / name, json.dumps(content, indent=1) + "\n")


def _dataset(sample_type: str) -> dict[str, Any]:
    def of(name: str) -> dict[str, str]:
        return {"__module__": "megatron.energon", "__class__": name}

    if sample_type == "vqa":
        fields = {"image": _IMAGES, "context": "json[0][content]", "answers": "json[1][content]"}
        return {"sample_type": of("VQASample"), "field_map": fields}
    if sample_type == "caption":
        fields = {"image": _IMAGES, "caption": "json[captions][0][content]"}
        return {"sample_type": of("CaptioningSample"), "field_map": fields}
    return {**of("CrudeWebdataset"), "subflavors": {"sample_type": sample_type}}
