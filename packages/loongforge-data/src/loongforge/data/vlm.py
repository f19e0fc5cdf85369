"""The `vlm` source: conversations with images and videos, out of `.jsonl` files or webdataset shards."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loongforge.core.data.contract import Contents, Sample, SourceRequest, VisualProcessor
from loongforge.core.data.quarantine import Bad, BadSampleError, Document
from loongforge.core.errors import DataError
from loongforge.data.accounts import Told
from loongforge.data.blend import PathGroup, parse_paths, split_range
from loongforge.data.conversation_source import ConversationSource
from loongforge.data.conversations import ChatRules, chat_rules
from loongforge.data.energon_folder import EnergonFolder
from loongforge.data.files import Files
from loongforge.data.items import gathered
from loongforge.data.media import Medium, MissingLibraryError, contents, decode
from loongforge.data.once import build_once
from loongforge.data.row_files import stamps
from loongforge.data.rows import Place
from loongforge.data.sequences import Group, check_packing, fill, plan_packs, taken
from loongforge.data.tokenise import spare_workers
from loongforge.data.unpack import unpacked
from loongforge.data.visual_encode import VisualRules
from loongforge.data.visual_file import VisualDocument, VisualFile, emptied, sources, write_visual

_FORMAT = 3
"""Raised when cached conversations of an earlier version must not be read."""


class VisualConversations:
    """Conversations `first` to `last - 1` of some files, one after the other."""

    def __init__(self, files: list[VisualFile], first: int, last: int) -> None:
        self.files = files
        self.first = first
        self._shards = Files()
        self._borders = np.cumsum([0, *(len(file) for file in files)])
        self.lengths: np.ndarray = np.concatenate([file.lengths for file in files])[first:last]
        """Tokens of each conversation, features included, int64."""

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> VisualDocument:
        """One conversation."""
        file, place = self._find(number)
        return file.read(place)

    def place(self, number: int) -> Place:
        """Where one conversation was read."""
        file, place = self._find(number)
        return file.place(place)

    def encoded(self, number: int) -> list[tuple[Medium, bytes | None]]:
        """Media of one conversation with their bytes as they are stored; see `contents`."""
        file, place = self._find(number)
        media = file.media(place)
        return list(zip(media, contents(media, self._shards), strict=True))

    def patches(self, number: int, grid: np.ndarray, processor: VisualProcessor) -> list[np.ndarray]:
        """Patches of every item of one conversation, decoded now; `DataError` for a corrupt or changed file.

        `grid` is that of its document.
        """
        found: list[np.ndarray] = []
        expected = iter(grid.tolist())
        for medium, content in self.encoded(number):
            for item in decode(medium, processor, content).items:
                if list(item.grid) != next(expected, None):
                    raise DataError(
                        f"{medium} has another size than when it was tokenised: it was changed. "
                        "Delete the data cache, it is built again."
                    )
                assert item.patches is not None, "a decoded item has patches"
                found.append(item.patches)
        return found

    def grids(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many items each conversation has, int64 `[conversations]`, and the grids of all, int64 `[items, 3]`."""
        places = numbers + self.first
        files = np.searchsorted(self._borders, places, side="right") - 1
        return gathered(files, lambda file, which: self.files[file].grids(places[which] - self._borders[file]))

    def _find(self, number: int) -> tuple[VisualFile, int]:
        file = int(self._borders.searchsorted(number + self.first, side="right")) - 1
        return self.files[file], number + self.first - int(self._borders[file])


class VisualSource(ConversationSource[VisualConversations]):
    """Samples of one or more sets of conversations, text and images; packed as the `chat` source packs.

    Features stand at `visual_positions`; nothing is learned where the label is a placeholder of one.
    """

    NAME = "vlm"

    def __init__(
        self,
        request: SourceRequest,
        pad_id: int,
        groups: list[tuple[VisualConversations, Group]],
        paths: list[PathGroup],
        facts: dict[str, str],
        counts: dict[str, Any],
    ) -> None:
        assert request.visual is not None, "open_vlm has looked"
        super().__init__(request, pad_id, groups, paths, facts, counts)
        self._processor = request.visual

    def contents(self, numbers: Sequence[int]) -> Contents:
        """Lengths and items of the conversations of several samples."""
        documents, samples = self._order.documents(numbers)
        lengths = np.empty(len(documents), dtype=np.int64)

        def of(group: int, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            conversations, chosen = self._groups[group][0], documents[which, 1]
            lengths[which] = conversations.lengths[chosen]
            return conversations.grids(chosen)

        items, grids = gathered(documents[:, 0], of)
        sizes = taken(self._request, lengths)
        return Contents(documents=documents, samples=samples, lengths=sizes, items=items, grids=grids)

    def fill(self, documents: np.ndarray) -> Sample:
        """A sequence of these conversations; `BadSampleError` names those whose images or videos are corrupt."""
        return self.fill_without(documents, ())

    def fill_without(self, documents: np.ndarray, left_out: Collection[Document]) -> Sample:
        """A sequence of these conversations with an empty place for each of `left_out`."""
        return self._filled([(group, number) for group, number in documents.tolist()], left_out)

    def _filled(self, chosen: list[tuple[int, int]], left_out: Collection[Document] = ()) -> Sample:
        documents = [self._groups[group][0].read(number) for group, number in chosen]
        documents = [
            emptied(one, self._pad_id) if which in left_out else one
            for which, one in zip(chosen, documents, strict=True)
        ]
        said = [(one.tokens, one.assistant) for one in documents]
        filled = fill(self._request, self._pad_id, said, self._request.packing)
        sample, borders = filled.sample, filled.borders
        sample["position_ids"] = self._positions(documents, borders)
        none = np.empty(0, dtype=np.int64)
        starts = zip(documents, borders, strict=False)
        sample["visual_positions"] = np.concatenate([none, *(one.features + start for one, start in starts)])
        sample["grid"] = np.concatenate([none.reshape(0, 3), *(one.grid for one in documents)])
        if self._request.pixels and len(sample["grid"]):
            sample["pixels"] = np.concatenate(self._patches(chosen, documents))
            assert len(sample["pixels"]) == int(sample["grid"].prod(axis=1).sum()), "patches are those of the grids"
        return sample

    def _patches(self, chosen: list[tuple[int, int]], documents: list[VisualDocument]) -> list[np.ndarray]:
        """Of all items; `BadSampleError` names every conversation with one that cannot be decoded."""
        patches: list[np.ndarray] = []
        bad: dict[Document, Bad] = {}
        for (group, number), document in zip(chosen, documents, strict=True):
            conversations = self._groups[group][0]
            if not len(document.grid):
                continue
            try:
                patches += conversations.patches(number, document.grid, self._processor)
            except MissingLibraryError:
                raise
            except DataError as error:
                place = conversations.place(number)
                bad[group, number] = Bad(file=place.path, row=place.row, reason=str(error))
        if bad:
            raise BadSampleError(bad)
        return patches

    def _positions(self, documents: list[VisualDocument], borders: list[int]) -> np.ndarray:
        """int64 `[seq_length]` or `[rank, seq_length]`; what pads a document goes on as text."""
        sizes = np.diff(borders).tolist()
        items = [one.items for one in documents] + [[]] * (len(sizes) - len(documents))
        parts = [self._processor.position_ids(size, placed) for size, placed in zip(sizes, items, strict=True)]
        rows = np.concatenate(parts, axis=1)
        assert len(rows) == self._request.position_rank, f"{len(rows)} rows of position ids"
        return rows if len(rows) > 1 else rows[0]


def open_vlm(request: SourceRequest) -> VisualSource:
    """The `vlm` source. Collective: rows are tokenised and images measured on the builder alone, once."""
    if request.visual is None:
        raise DataError("the source 'vlm' reads images for a model with an image encoder; this model has none.")
    check_packing(request)
    rules = chat_rules(request)
    tokenizer, _ = rules.open()
    identity = repr((_FORMAT, rules.identity(), request.visual))
    groups: list[tuple[VisualConversations, Group]] = []
    facts = {"template": hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()}
    told = Told()
    paths = parse_paths(request.paths)
    for number, entry in enumerate(paths):
        files = [_tokenised(path, request, request.visual, rules, identity) for path in entry.paths]
        first, last = split_range(request.split, request.part, sum(len(file) for file in files))
        conversations = VisualConversations(files, first, last)
        digest = " ".join(file.facts["digest"] for file in files)
        facts[f"data.{number}"] = digest
        content = f"{digest} {first} {last}"
        packs = plan_packs(conversations.lengths, request, content) if request.packing else None
        groups.append((conversations, Group(len(conversations), packs)))
        for file in files:
            told.add(file.folder, file.facts)
    facts["weights"] = " ".join(f"{entry.weight:g}" for entry in paths)
    return VisualSource(request, tokenizer.pad_id, groups, paths, facts, told.report())


def _tokenised(
    path: str, request: SourceRequest, processor: VisualProcessor, rules: ChatRules, identity: str
) -> VisualFile:
    """The conversations of a path, tokenised into the cache first when they are not there."""
    part = "train" if request.split is not None else request.part
    files = sources(path, part, stream=True)
    files = unpacked(files, request.cache, is_builder=request.is_builder, barrier=request.barrier)
    prepared = EnergonFolder.open(Path(path))
    fields = None if prepared is None else prepared.fields
    verified = ("verified",) if request.verify_media else ()
    told = (stamps(files), identity, *verified, *([] if fields is None else [fields]))
    key = hashlib.blake2b(repr(told).encode(), digest_size=8).hexdigest()
    folder = request.cache / f"{Path(path).stem}-{key}"
    everything = VisualRules(
        chat=rules,
        processor=processor,
        folder=files[0].parent,
        verify=request.verify_media,
        fields=fields,
        may_leave_out=request.may_leave_out,
    )

    def build() -> None:
        write_visual(files, folder, everything, max(spare_workers(file) for file in files))

    build_once(folder, build, is_builder=request.is_builder, barrier=request.barrier)
    return VisualFile(folder)
