"""The `chat` source: fine-tuning samples from conversations, packed or one per sequence."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loongforge.core.data.contract import Contents, Sample, SourceRequest
from loongforge.core.errors import DataError
from loongforge.data.blend import parse_paths, split_range
from loongforge.data.conversations import ChatRules, ConversationFile, write_conversations
from loongforge.data.once import build_once
from loongforge.data.pack import Packs
from loongforge.data.sequences import Group, Order, check_packing, fill, plan_packs, settings, taken
from loongforge.data.tokenise import TokenizerChoice, spare_workers
from loongforge.data.tokenizer import HFTokenizer

_FORMAT = 1
"""Raised when cached conversations of an earlier version must not be read."""


class Conversations:
    """Conversations `first` to `last - 1` of some files, one after the other."""

    def __init__(self, files: list[ConversationFile], first: int, last: int) -> None:
        self._files = files
        self._first = first
        self._borders = np.cumsum([0, *(len(file) for file in files)])
        lengths = np.concatenate([np.diff(file.offsets) for file in files])
        self.lengths: np.ndarray = lengths[first:last]
        """Tokens of each conversation, int64."""

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and assistant mask of one conversation."""
        file = int(np.searchsorted(self._borders, number + self._first, side="right")) - 1
        return self._files[file].read(number + self._first - int(self._borders[file]))


class ChatSource:
    """Samples of one or more conversations; labels are the next tokens within a conversation, the mask is aligned.

    Packed: each conversation is a segment that attends to itself alone, padded to `segment_multiple`. The packs are
    planned once and visited in another order in every epoch. Unpacked: one conversation per sample, padded at the end.
    """

    def __init__(
        self,
        request: SourceRequest,
        pad_id: int,
        groups: list[tuple[Conversations, Packs | None]],
        weights: list[float],
        facts: dict[str, str],
        counts: dict[str, Any],
    ) -> None:
        self._request = request
        self._pad_id = pad_id
        self._groups = groups
        self._order = Order(request, [Group(len(one), packs) for one, packs in groups], weights)
        self._facts = facts
        self._counts = counts

    def __len__(self) -> int:
        """Samples asked for; the data repeats in further epochs to reach any number."""
        return self._request.num_samples

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`."""
        group, numbers = self._order[index]
        return self._filled([(group, number) for number in numbers])

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

    def _filled(self, documents: list[tuple[int, int]]) -> Sample:
        said = [self._groups[group][0].read(number) for group, number in documents]
        return fill(self._request, self._pad_id, said, self._request.packing).sample

    def fingerprint(self) -> Mapping[str, str]:
        """Everything the order and the content of samples depend on."""
        return {"source": "chat", **self._facts, **settings(self._request)}

    def report(self) -> Mapping[str, Any]:
        """Rows and what became of them, tokens, packs and how full they are, epochs asked for."""
        units = self._order.units
        positions = sum(int((conversations.lengths - 1).sum()) for conversations, _ in self._groups)
        return {
            "source": "chat",
            "part": self._request.part,
            **self._counts,
            "used": sum(len(conversations) for conversations, _ in self._groups),
            "sequences": units,
            "filled": round(positions / (units * self._request.seq_length), 4),
            "samples": self._request.num_samples,
            "epochs": round(self._request.num_samples / units, 3),
        }


def open_chat(request: SourceRequest) -> ChatSource:
    """The `chat` source. Collective: conversations are tokenised and packed on the builder alone, once."""
    check_packing(request)
    choice = TokenizerChoice(path=request.tokenizer_path, kind=request.tokenizer_type, vocab_size=request.vocab_size)
    rules = ChatRules(
        choice=choice,
        template_file=request.chat_template,
        messages_field=request.messages_field,
        train_on_prompt=request.train_on_prompt,
        overlong=request.overlong,
        seq_length=request.seq_length,
    )
    tokenizer, identity = _identity(rules)
    groups: list[tuple[Conversations, Packs | None]] = []
    facts = {"template": hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()}
    counts: Counter[str] = Counter()
    lines: list[str] = []
    chosen = parse_paths(request.paths)
    for number, group in enumerate(chosen):
        files = [_tokenised(path, request, rules, identity) for path in group.paths]
        first, last = split_range(request.split, request.part, sum(len(file) for file in files))
        conversations = Conversations(files, first, last)
        digest = " ".join(file.facts["digest"] for file in files)
        facts[f"data.{number}"] = digest
        packs = plan_packs(conversations.lengths, request, f"{digest} {first} {last}") if request.packing else None
        groups.append((conversations, packs))
        for path, file in zip(group.paths, files, strict=True):
            counts.update({name: file.facts[name] for name in ("rows", "tokens", "trained_tokens", "truncated")})
            counts.update({f"dropped ({reason})": count for reason, count in file.facts["dropped"].items()})
            counts.update({"merged_turn_starts": file.facts["merged_turn_starts"]})
            lines.extend(f"{path}, {line}" for line in file.facts["dropped_lines"])
    facts["weights"] = " ".join(f"{group.weight:g}" for group in chosen)
    told: dict[str, Any] = {**counts, **({"dropped_rows": lines} if lines else {})}
    return ChatSource(request, tokenizer.pad_id, groups, [group.weight for group in chosen], facts, told)


def _identity(rules: ChatRules) -> tuple[HFTokenizer, str]:
    """The tokenizer, and a text of everything that decides the tokens of a conversation."""
    tokenizer, template = rules.open()
    decisive = (_FORMAT, tokenizer.identity(), template.source, sorted(tokenizer.special_tokens.items()))
    return tokenizer, repr((*decisive, rules.messages_field, rules.train_on_prompt, rules.overlong, rules.seq_length))


def _tokenised(path: str, request: SourceRequest, rules: ChatRules, identity: str) -> ConversationFile:
    """The conversations of a file, tokenised into the cache first when they are not there."""
    file = Path(path)
    if file.suffix not in (".jsonl", ".json"):
        raise DataError(f"{path}: fine-tuning reads .jsonl files with a field {request.messages_field!r} per row.")
    if not file.is_file():
        raise DataError(f"no file {file}.")
    status = file.stat()
    decisive = repr((os.path.realpath(file), status.st_size, status.st_mtime_ns, identity))
    folder = request.cache / f"{file.stem}-{hashlib.blake2b(decisive.encode(), digest_size=8).hexdigest()}"

    def build() -> None:
        write_conversations(file, folder, rules, spare_workers(file))

    build_once(folder, build, is_builder=request.is_builder, barrier=request.barrier)
    return ConversationFile(folder)
