"""Conversations with images, tokenised once: memory-mapped arrays of tokens, items and where their media lie."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from loongforge.core.data.contract import PlacedItem
from loongforge.core.errors import DataError
from loongforge.data.items import spans
from loongforge.data.media import Kind, Medium
from loongforge.data.progress import progress
from loongforge.data.rows import BadRows, read_lines
from loongforge.data.shards import read_index, shards_of
from loongforge.data.tokenise import BATCH_ROWS, in_order
from loongforge.data.visual_encode import Compact, Place, Source, VisualAnswer, VisualEncoder, VisualRules

_NAMED = 5
"""Dropped rows that a report names."""
_TABLES: dict[str, tuple[Any, int]] = {
    "tokens": (np.int32, 1),
    "mask": (np.bool_, 1),
    "items": (np.int64, 5),  # place in the conversation, t, h, w, features
    "seconds": (np.float64, 1),
    "media": (np.int64, 7),  # kind, path from and size, name from and size, offset, size or -1
    "names": (np.uint8, 1),
}
_KINDS: tuple[Kind, ...] = ("image", "video", "audio")


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualDocument:
    """One conversation with a position for every feature."""

    tokens: np.ndarray
    """int32 `[length]`."""
    assistant: np.ndarray
    """bool `[length]`."""
    items: list[PlacedItem]
    features: np.ndarray
    """int64 `[features]`: positions of features, ascending."""
    grid: np.ndarray
    """int64 `[items, 3]`."""


class VisualFile:
    """A folder of arrays end to end, with the borders of conversations in each."""

    def __init__(self, folder: Path) -> None:
        try:
            self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
            with np.load(folder / "borders.npz") as borders:
                self._tokens, self._items, self._media = (borders[name] for name in ("tokens", "items", "media"))
                self.lengths: np.ndarray = borders["lengths"]
            self._tables = {name: _table(folder / f"{name}.bin", *_TABLES[name]) for name in _TABLES}
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"the cache {folder} is damaged ({error}): delete the folder, it is built again."
            ) from error

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> VisualDocument:
        """One conversation."""
        chosen = slice(int(self._tokens[number]), int(self._tokens[number + 1]))
        tokens, mask = self._tables["tokens"][chosen], self._tables["mask"][chosen]
        listed = slice(int(self._items[number]), int(self._items[number + 1]))
        items, seconds = self._tables["items"][listed], self._tables["seconds"][listed]
        places, features = items[:, 0], items[:, 4]
        counts = np.ones(len(tokens), dtype=np.int64)
        counts[places] = features
        starts = np.cumsum(counts)[places] - features
        within = np.arange(int(features.sum())) - np.repeat(np.cumsum(features) - features, features)
        placed = [
            PlacedItem(start=start, grid=(t, h, w), seconds_per_grid=pause)
            for start, (_, t, h, w, _), pause in zip(starts.tolist(), items.tolist(), seconds.tolist(), strict=True)
        ]
        return VisualDocument(
            tokens=np.repeat(tokens, counts),
            assistant=np.repeat(mask, counts),
            items=placed,
            features=np.repeat(starts, features) + within,
            grid=np.array(items[:, 1:4]),
        )

    def grids(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many items each conversation has, int64 `[conversations]`, and the grids of all, int64 `[items, 3]`."""
        first = self._items[numbers]
        counts = self._items[numbers + 1] - first
        return counts, np.array(self._tables["items"].reshape(-1, 5)[spans(first, counts), 1:4])

    def media(self, number: int) -> list[Medium]:
        """Images and videos of one conversation, in order."""
        chosen = self._tables["media"][int(self._media[number]) : int(self._media[number + 1])]
        names = self._tables["names"]

        def text(start: int, size: int) -> str:
            return names[start : start + size].tobytes().decode("utf-8", "surrogateescape")

        return [
            Medium(
                kind=_KINDS[kind],
                path=text(path, path_size),
                name=text(name, name_size),
                offset=offset,
                size=None if size < 0 else size,
            )
            for kind, path, path_size, name, name_size, offset, size in chosen.tolist()
        ]


def write_visual(paths: list[Path], folder: Path, rules: VisualRules, workers: int) -> None:
    """Tokenise rows of a `.jsonl` file, or of shards, into `folder`, which appears whole or not at all.

    `DataError` names bad rows by file and line, or shard and key.
    """
    temporary = folder.with_name(f"{folder.name}.writing-{os.getpid()}")
    total = sum(os.path.getsize(path) for path in paths)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with ExitStack() as stack:
            streams = {name: stack.enter_context(open(temporary / f"{name}.bin", "wb")) for name in _TABLES}
            advance = stack.enter_context(progress(f"tokenising {folder.name.rpartition('-')[0]}", total))
            writer, bad = _Writer(streams), BadRows()
            for answer in in_order(VisualEncoder, (rules,), _batches(_sources(paths, bad)), workers):
                for place, reason in answer.bad:
                    bad.add(place.path, place.row, reason)
                writer.add(answer)
                advance(answer.size)
            bad.check()
        writer.finish(temporary, paths)
        os.rename(temporary, folder)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}. Give --data-cache-path DIR.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sources(path: str) -> list[Path]:
    """The files behind a path: a `.jsonl` file, a shard, the shards of a directory; `DataError` for anything else."""
    file = Path(path)
    if file.is_dir() or file.suffix == ".tar":
        return shards_of(file)
    if file.suffix not in (".jsonl", ".json"):
        raise DataError(f"{path}: images and videos are read from .jsonl files, .tar shards and directories of shards.")
    if not file.is_file():
        raise DataError(f"no file {file}.")
    return [file]


def _sources(paths: list[Path], bad: BadRows) -> Iterator[Source]:
    for path in paths:
        if path.suffix == ".tar":
            for sample in read_index(path):
                yield Place(str(path), f"key {sample.key!r}"), sample
        else:
            for number, line in read_lines(path, bad):
                yield Place(str(path), number), line


def _batches(rows: Iterable[Source]) -> Iterator[list[Source]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, BATCH_ROWS)):
        yield batch


class _Writer:
    """Appends conversations to the tables and accounts for every row."""

    def __init__(self, streams: Mapping[str, IO[bytes]]) -> None:
        self._streams = streams
        self._sizes: dict[str, list[int]] = {"tokens": [], "items": [], "media": []}
        self._lengths: list[int] = []
        self._known: dict[str, tuple[int, int]] = {}
        self._named = 0
        self._counts: Counter[str] = Counter(rows=0, truncated=0, trained_tokens=0, merged_turn_starts=0)
        self._dropped: Counter[str] = Counter()
        self._lines: list[str] = []
        self._digest = hashlib.blake2b(digest_size=8)

    def add(self, answer: VisualAnswer) -> None:
        """One batch."""
        self._counts["rows"] += len(answer.kept) + len(answer.dropped)
        self._counts["truncated"] += answer.truncated
        for place, reason in answer.dropped:
            self._dropped[reason] += 1
            if len(self._lines) < _NAMED:
                self._lines.append(f"{place}: {reason}")
        for one in answer.kept:
            self._conversation(one)

    def _conversation(self, one: Compact) -> None:
        items = [(place, *item.grid, item.features) for place, item in zip(one.places.tolist(), one.items, strict=True)]
        tables = {
            "tokens": one.tokens,
            "mask": one.assistant,
            "items": np.array(items, dtype=np.int64),
            "seconds": np.array([whole.seconds_per_grid for whole in one.placed for _ in whole.items]),
        }
        for name, rows in tables.items():
            content = rows.astype(_TABLES[name][0]).tobytes()
            self._streams[name].write(content)
            self._digest.update(content)
        for medium in one.media:
            size = -1 if medium.size is None else medium.size
            row = (_KINDS.index(medium.kind), *self._text(medium.path), *self._text(medium.name), medium.offset, size)
            self._streams["media"].write(np.array(row, dtype=np.int64).tobytes())
        for name, count in (("tokens", len(one.tokens)), ("items", len(items)), ("media", len(one.media))):
            self._sizes[name].append(count)
        self._lengths.append(one.length)
        self._counts["trained_tokens"] += int(one.assistant[1:].sum())
        self._counts["merged_turn_starts"] += one.merged
        self._counts.update(f"{medium.kind}s" for medium in one.media)

    def _text(self, text: str) -> tuple[int, int]:
        """Where a path or name is written; one that came before is written once."""
        if text not in self._known:
            content = text.encode("utf-8", "surrogateescape")
            self._streams["names"].write(content)
            place = (self._named, len(content))
            self._named += len(content)
            if len(self._known) >= 1 << 16:  # shard paths repeat at once, names of samples hardly ever
                self._known.clear()
            self._known[text] = place
        return self._known[text]

    def finish(self, folder: Path, paths: list[Path]) -> None:
        """Write borders and facts; `DataError` when nothing was kept."""
        where = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} shards)"
        if not self._counts["rows"]:
            raise DataError(f"{where} holds no conversation.")
        if not self._lengths:
            raise DataError(
                f"{where}: none of {self._counts['rows']} conversations can be used: {'; '.join(self._lines)}."
            )
        tokens, items, media = (np.array([0, *accumulate(self._sizes[name])]) for name in ("tokens", "items", "media"))
        lengths = np.array(self._lengths)
        np.savez(folder / "borders.npz", tokens=tokens, items=items, media=media, lengths=lengths)
        facts = {
            **self._counts,
            "tokens": sum(self._lengths),
            "dropped": dict(self._dropped),
            "dropped_lines": self._lines,
            "digest": self._digest.hexdigest(),
        }
        (folder / "facts.json").write_text(json.dumps(facts))


def _table(file: Path, kind: Any, width: int) -> np.ndarray:
    """A table from its file; one row of `width` numbers each, or single numbers."""
    rows = os.path.getsize(file) // (np.dtype(kind).itemsize * width)
    shape = (rows,) if width == 1 else (rows, width)
    return np.memmap(file, dtype=kind, mode="r", shape=shape) if rows else np.empty(shape, dtype=kind)
