"""A folder that Megatron-Energon has prepared, by its own files: which shards a part has, and what of a sample is what.

Energon itself is not needed, and nothing that the folder names is imported or run.
Format: https://nvidia.github.io/Megatron-Energon (data preparation, dataset formats).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from loongforge.core.config import yaml_file
from loongforge.core.errors import ConfigError, DataError
from loongforge.data.shards import ShardSample

META = ".nv-meta"
_PARTS = {"train": "train", "valid": "val", "test": "test"}
_MOST = 100_000
"""Shards that one pattern may stand for."""
_FIELDS = {
    "VQASample": ("image", "context", "answers"),
    "CaptioningSample": ("image", "caption"),
}
"""Sample types that are read: an image, what is asked about it, if anything, and what is answered."""
_OWN = ("CrudeWebdataset",)
"""Sample types whose json says what it is."""
_ACCESS = re.compile(r"(?P<extension>[^\[\]]+)(?P<steps>(\[[^\[\]]+\])*)")

Read = Callable[[str], bytes]
"""From the extension of a member to its bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFields:
    """What a field of Energon's sample type is taken from: `jpg,png` or `json[0][content]`."""

    kind: str
    places: tuple[tuple[str, str], ...]

    def row(self, sample: ShardSample, read: Read, messages_field: str) -> dict[str, Any]:
        """A sample as a row with messages; `ValueError` names a field that is not there."""
        (_, image), *texts = self.places
        *asks, answer = (_text(name, place, sample, read) for name, place in texts)
        asked = "".join(asks)
        asked = asked if "<image>" in asked + answer else f"<image>{asked}"
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return {messages_field: messages, "images": [_member("image", image, sample)]}


def _member(name: str, place: str, sample: ShardSample) -> str:
    """The first of the extensions that the sample has."""
    for extension in place.split(","):
        if sample.find(extension.strip()) is not None:
            return extension.strip()
    raise ValueError(
        f"field {name!r} is {place} in dataset.yaml, and the sample has "
        f"{', '.join(one.extension for one in sample.members)}."
    )


def _text(name: str, place: str, sample: ShardSample, read: Read) -> str:
    """A text, or the first of a list of them."""
    found = _ACCESS.fullmatch(place)
    assert found is not None, "checked when the folder was read"
    extension = _member(name, found["extension"], sample)
    content = read(extension)
    value: Any
    try:
        value = json.loads(content) if extension.rpartition(".")[2] == "json" else content.decode()
        for step in re.findall(r"\[([^\[\]]+)\]", found["steps"]):
            value = value[int(step) if isinstance(value, list) else step]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"field {name!r} is {place} in dataset.yaml: {type(error).__name__}: {error}.") from error
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r}, {place} in dataset.yaml, holds {type(value).__name__}, not text.")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergonFolder:
    """A prepared folder."""

    folder: Path
    parts: dict[str, tuple[str, ...]]
    """Shards of each part, relative to the folder, patterns written out."""
    fields: SampleFields | None
    """None: the samples' json says what it is."""

    @staticmethod
    def open(folder: Path) -> EnergonFolder | None:
        """None where there is none; `DataError` where it cannot be read as it says."""
        meta = folder / META
        if not (meta / "split.yaml").is_file():
            return None
        try:
            split, dataset = yaml_file.read(meta / "split.yaml"), meta / "dataset.yaml"
            parts, without = split.get("split_parts"), split.get("exclude") or []
            if not isinstance(parts, dict) or not isinstance(without, list):
                raise DataError(f"{meta / 'split.yaml'}: split_parts must map parts to lists of shards.")
            excluded = {shard for one in without for shard in _shards(meta, one)}
            found = {
                str(part): tuple(shard for one in names or () for shard in _shards(meta, one) if shard not in excluded)
                for part, names in parts.items()
            }
            fields = _fields(dataset) if dataset.is_file() else None
        except ConfigError as error:
            raise DataError(*error.problems) from error
        return EnergonFolder(folder=folder, parts=found, fields=fields)

    def shards(self, part: str) -> list[Path]:
        """Of `train`, `valid` or `test`; `DataError` when it has none or one is not there."""
        found = self.parts.get(_PARTS[part], ())
        if not found:
            have = ", ".join(f"{name} ({len(names)} shards)" for name, names in self.parts.items() if names)
            raise DataError(
                f"{self.folder}: {META}/split.yaml has no shards of {_PARTS[part]!r}; it has {have or 'none at all'}."
            )
        paths = [self.folder / shard for shard in found]
        if absent := [path for path in paths if not path.is_file()]:
            raise DataError(
                f"{absent[0]} is absent, which {META}/split.yaml names: {len(absent)} of {len(paths)} shards are."
            )
        return paths


def _shards(meta: Path, pattern: Any) -> list[str]:
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", str(pattern))
    try:  # a range is written out before the first name comes
        wide = any(abs(int(last) - int(first)) > _MOST for first, last in ranges)
        found = [] if wide else list(islice(braceexpand(str(pattern)), _MOST + 1))
    except ValueError as error:  # unbalanced braces
        raise DataError(f"{meta / 'split.yaml'}: {pattern!r}: {error}.") from error
    if wide or len(found) > _MOST:
        raise DataError(f"{meta / 'split.yaml'}: {pattern!r} stands for more than {_MOST} shards.")
    for name in found:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{meta / 'split.yaml'}: {name!r} leads out of the folder.")
    return found


def _fields(file: Path) -> SampleFields | None:
    content = yaml_file.read(file)
    if code := [name for name in ("sample_loader", "part_filter") if name in content]:
        raise DataError(
            f"{file}: {code[0]} names Python code, which is not run: say field_map, or write the shards anew with "
            "loongforge data convert-to-webdataset."
        )
    said = content.get("sample_type", content)  # a crude dataset names its class at the top
    kind = said.get("__class__") if isinstance(said, dict) else None
    if kind in _OWN:
        return None
    if kind not in _FIELDS:
        raise DataError(f"{file}: sample type {kind!r} is not read: {', '.join((*_FIELDS, *_OWN))} are.")
    places = content.get("field_map")
    places = places if isinstance(places, dict) else {}
    for name in _FIELDS[kind]:
        place = places.get(name)
        if not isinstance(place, str) or not _ACCESS.fullmatch(place):
            raise DataError(f"{file}: field_map of {kind} needs {name!r} as text, like jpg or json[caption].")
    return SampleFields(kind=kind, places=tuple((name, places[name]) for name in _FIELDS[kind]))
