"""Conversations with images, tokenised once: memory-mapped arrays of tokens, items and where their media lie."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np

from loongforge.core.data.contract import PlacedItem
from loongforge.core.errors import DataError
from loongforge.data.accounts import Accounts
from loongforge.data.energon_folder import EnergonFolder
from loongforge.data.index import open_indices
from loongforge.data.items import spans
from loongforge.data.media import Kind, Medium
from loongforge.data.progress import progress
from loongforge.data.row_files import ROWS, name_of, read_rows, row_files
from loongforge.data.rows import BadRows, Place
from loongforge.data.shards import shards_of
from loongforge.data.tokenise import batched, in_order
from loongforge.data.unpack import COMPRESSED, is_compressed
from loongforge.data.visual_encode import Compact, Source, VisualEncoder, VisualRules

_TABLES: dict[str, tuple[Any, int]] = {
    "tokens": (np.int32, 1),
    "mask": (np.bool_, 1),
    "items": (np.int64, 5),  # place in the conversation, t, h, w, features
    "seconds": (np.float64, 1),
    "media": (np.int64, 7),  # kind, path from and size, name from and size, offset, size or -1
    "rows": (np.int64, 5),  # path from and size, line or -1, key from and size
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


def emptied(document: VisualDocument, pad_id: int) -> VisualDocument:
    """As long as the document, without items, and with nothing to learn."""
    return VisualDocument(
        tokens=np.full_like(document.tokens, pad_id),
        assistant=np.zeros_like(document.assistant),
        items=[],
        features=document.features[:0],
        grid=document.grid[:0],
    )


class VisualFile:
    """A folder of arrays end to end, with the borders of conversations in each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        return [
            Medium(
                kind=_KINDS[kind],
                path=self._text(path, path_size),
                name=self._text(name, name_size),
                offset=offset,
                size=None if size < 0 else size,
            )
            for kind, path, path_size, name, name_size, offset, size in chosen.tolist()
        ]

    def place(self, number: int) -> Place:
        """Where a conversation was read."""
        path, path_size, line, key, key_size = self._tables["rows"][number].tolist()
        return Place(self._text(path, path_size), self._text(key, key_size) if line < 0 else line)

    def _text(self, start: int, size: int) -> str:
        return self._tables["names"][start : start + size].tobytes().decode("utf-8", "surrogateescape")


def write_visual(paths: list[Path], folder: Path, rules: VisualRules, workers: int) -> None:
    """Tokenise rows of a `.jsonl` file, or of shards, into `folder`, which appears whole or not at all.

    Bad rows are named by file and line, or shard and key: in a `DataError`, or in the account of the cache as far as
    the rules let them be left out.
    """
    temporary = folder.with_name(f"{folder.name}.writing-{os.getpid()}")
    total = sum(os.path.getsize(path) for path in paths)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with ExitStack() as stack:
            streams = {name: stack.enter_context(open(temporary / f"{name}.bin", "wb")) for name in _TABLES}
            advance = stack.enter_context(progress(f"tokenising {folder.name.rpartition('-')[0]}", total))
            writer, bad = _Writer(streams), BadRows(rules.may_leave_out)
            accounts = stack.enter_context(Accounts(temporary))
            rows = accounts.planned(_sources(paths, bad, folder.parent, advance))
            for answer in in_order(VisualEncoder, (rules,), batched(rows), workers):
                for place, reason in answer.bad:
                    bad.add(place.path, place.row, reason)
                accounts.add(answer)
                for place, one in zip(answer.places, answer.kept, strict=True):
                    writer.add(place, one)
            bad.check()
            facts = accounts.summary(name_of(paths), len(writer.lengths), bad.found)
        (temporary / "facts.json").write_text(json.dumps({**facts, **writer.finish(temporary)}))
        os.rename(temporary, folder)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}. Give --data-cache-path DIR.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sources(path: str, part: str = "train", *, stream: bool = False) -> list[Path]:
    """The files behind a path: shards, or files of rows; `DataError` for anything else.

    Of a folder that Energon has prepared, the shards of `part`. Compressed shards are among them where the caller can
    `stream` them.
    """
    file = Path(path)
    endings = (".tar", *COMPRESSED)
    if not file.is_dir() and not file.name.endswith((*endings, *ROWS)):
        raise DataError(
            f"{path}: images and videos are read from {', '.join(ROWS)} files, .tar shards and directories."
        )
    if (prepared := EnergonFolder.open(file)) is not None:
        found = prepared.shards(part)
    elif file.name.endswith(endings) or (file.is_dir() and any(one.name.endswith(endings) for one in file.iterdir())):
        found = shards_of(file, endings)
    else:
        return row_files(file)
    if not stream and (packed := [one for one in found if is_compressed(one)]):
        raise DataError(f"{packed[0]} is compressed, which training alone unpacks, into its cache: unpack it before.")
    return found


def _sources(paths: list[Path], bad: BadRows, cache: Path, advance: Callable[[int], None]) -> Iterator[Source]:
    """Rows of files of one kind."""
    if paths[0].suffix != ".tar":
        for path in paths:
            for number, line in read_rows(path, bad, advance):
                yield Place(str(path), number), line
        return
    for index in open_indices(paths, cache):
        for problem in index.problems:
            bad.add(index.shard, problem.place, problem.reason)
        for sample in index:
            advance(sum(member.size for member in sample.members))
            yield Place(sample.shard, f"key {sample.key!r}"), sample


class _Writer:
    """Appends conversations to the tables and adds up what they hold."""

    def __init__(self, streams: Mapping[str, IO[bytes]]) -> None:
        self.lengths: list[int] = []
        self._streams = streams
        self._sizes: dict[str, list[int]] = {"tokens": [], "items": [], "media": []}
        self._known: dict[str, tuple[int, int]] = {}
        self._named = 0
        self._counts: Counter[str] = Counter(trained_tokens=0, merged_turn_starts=0)
        self._digest = hashlib.blake2b(digest_size=8)

    def add(self, place: Place, one: Compact) -> None:
        """One conversation."""
        items = [(start, *item.grid, item.features) for start, item in zip(one.places.tolist(), one.items, strict=True)]
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
        row = (-1, *self._text(place.row)) if isinstance(place.row, str) else (place.row, 0, 0)
        self._streams["rows"].write(np.array((*self._text(place.path), *row), dtype=np.int64).tobytes())
        for name, count in (("tokens", len(one.tokens)), ("items", len(items)), ("media", len(one.media))):
            self._sizes[name].append(count)
        self.lengths.append(one.length)
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

    def finish(self, folder: Path) -> dict[str, Any]:
        """Write the borders; what was added up."""
        tokens, items, media = (np.array([0, *accumulate(self._sizes[name])]) for name in ("tokens", "items", "media"))
        np.savez(folder / "borders.npz", tokens=tokens, items=items, media=media, lengths=np.array(self.lengths))
        return {**self._counts, "tokens": sum(self.lengths), "digest": self._digest.hexdigest()}


def _table(file: Path, kind: Any, width: int) -> np.ndarray:
    """A table from its file; one row of `width` numbers each, or single numbers."""
    rows = os.path.getsize(file) // (np.dtype(kind).itemsize * width)
    shape = (rows,) if width == 1 else (rows, width)
    if not rows:
        return np.empty(shape, dtype=kind)
    return np.asarray(np.memmap(file, dtype=kind, mode="r", shape=shape))  # a slice of it costs a third of a memmap's
