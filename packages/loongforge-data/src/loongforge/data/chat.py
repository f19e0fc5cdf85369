"""The `chat` source: fine-tuning samples from conversations, packed or one per sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loongforge.core.data.contract import Contents, Sample, SourceRequest
from loongforge.data.accounts import Told
from loongforge.data.blend import parse_paths, split_range
from loongforge.data.conversation_source import ConversationSource
from loongforge.data.conversations import ChatRules, ConversationFile, chat_rules, write_conversations
from loongforge.data.once import build_once
from loongforge.data.row_files import row_files, stamps
from loongforge.data.sequences import Group, check_packing, fill, plan_packs, taken
from loongforge.data.tokenise import spare_workers

_FORMAT = 3
"""Raised when cached conversations of an earlier version must not be read."""


class Conversations:
    """Conversations `first` to `last - 1` of some files, one after the other."""

    def __init__(self, files: list[ConversationFile], first: int, last: int) -> None:
        self.files = files
        self.first = first
        self._borders = np.cumsum([0, *(len(file) for file in files)])
        lengths = np.concatenate([np.diff(file.offsets) for file in files])
        self.lengths: np.ndarray = lengths[first:last]
        """Tokens of each conversation, int64."""

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and assistant mask of one conversation."""
        file = int(np.searchsorted(self._borders, number + self.first, side="right")) - 1
        return self.files[file].read(number + self.first - int(self._borders[file]))


class ChatSource(ConversationSource[Conversations]):
    """Samples of one or more conversations; labels are the next tokens within a conversation, the mask is aligned.

    Packed: each conversation is a segment that attends to itself alone, padded to `segment_multiple`. The packs are
    planned once and visited in another order in every epoch. Unpacked: one conversation per sample, padded at the end.
    """

    NAME = "chat"

    def contents(self, numbers: Sequence[int]) -> Contents:
        """Lengths of the conversations of several samples."""
        documents, samples = self._order.documents(numbers)
        lengths = np.empty(len(documents), dtype=np.int64)
        for group, (conversations, _) in enumerate(self._groups):
            here = documents[:, 0] == group
            lengths[here] = conversations.lengths[documents[here, 1]]
        return Contents(
            documents=documents,
            samples=samples,
            lengths=taken(self._request, lengths),
            items=np.zeros_like(lengths),
            grids=np.empty((0, 3), dtype=np.int64),
        )

    def fill(self, documents: np.ndarray) -> Sample:
        """A sequence of these conversations."""
        return self._filled([(group, number) for group, number in documents.tolist()])

    def _filled(self, chosen: list[tuple[int, int]]) -> Sample:
        said = [self._groups[group][0].read(number) for group, number in chosen]
        return fill(self._request, self._pad_id, said, self._request.packing).sample


def open_chat(request: SourceRequest) -> ChatSource:
    """The `chat` source. Collective: conversations are tokenised and packed on the builder alone, once."""
    check_packing(request)
    rules = chat_rules(request)
    tokenizer, _ = rules.open()
    identity = repr((_FORMAT, rules.identity()))
    groups: list[tuple[Conversations, Group]] = []
    facts = {"template": hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()}
    told = Told()
    chosen = parse_paths(request.paths)
    for number, group in enumerate(chosen):
        files = [_tokenised(path, request, rules, identity) for path in group.paths]
        first, last = split_range(request.split, request.part, sum(len(file) for file in files))
        conversations = Conversations(files, first, last)
        digest = " ".join(file.facts["digest"] for file in files)
        facts[f"data.{number}"] = digest
        packs = plan_packs(conversations.lengths, request, f"{digest} {first} {last}") if request.packing else None
        groups.append((conversations, Group(len(conversations), packs)))
        for file in files:
            told.add(file.folder, file.facts)
    facts["weights"] = " ".join(f"{group.weight:g}" for group in chosen)
    return ChatSource(request, tokenizer.pad_id, groups, chosen, facts, told.report())


def _tokenised(path: str, request: SourceRequest, rules: ChatRules, identity: str) -> ConversationFile:
    """The conversations of a path, tokenised into the cache first when they are not there."""
    files = row_files(path)
    key = hashlib.blake2b(repr((stamps(files), identity)).encode(), digest_size=8).hexdigest()
    folder = request.cache / f"{Path(path).stem}-{key}"

    def build() -> None:
        workers = max(spare_workers(file) for file in files)
        write_conversations(files, folder, rules, workers, request.may_leave_out)

    build_once(folder, build, is_builder=request.is_builder, barrier=request.barrier)
    return ConversationFile(folder)
