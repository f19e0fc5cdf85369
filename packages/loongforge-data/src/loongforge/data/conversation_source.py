"""What sources of conversations have in common: which of them a sequence holds, and the account of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from loongforge.core.data.contract import Sample, SourceRequest
from loongforge.core.data.quarantine import Bad
from loongforge.data.accounts import left_out
from loongforge.data.blend import PathGroup, told_epochs
from loongforge.data.sequences import Group, Order, Packed, settings


class CachedFile(Protocol):
    """Conversations of one file, tokenised into a folder."""

    @property
    def folder(self) -> Path:
        """Where."""
        ...

    def __len__(self) -> int: ...


class Stretch(Protocol):
    """Conversations `first` to `first + len(lengths) - 1` of some files, one after the other."""

    @property
    def files(self) -> Sequence[CachedFile]:
        """The files."""
        ...

    @property
    def first(self) -> int:
        """Number of the first one, over all files."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64."""
        ...


class ConversationSource[S: Stretch](ABC):
    """Samples of one or more conversations, from a stretch of each corpus asked for."""

    NAME: ClassVar[str]
    """As users name the source."""

    def __init__(
        self,
        request: SourceRequest,
        pad_id: int,
        groups: list[tuple[S, Group]],
        paths: list[PathGroup],
        facts: dict[str, str],
        counts: dict[str, Any],
    ) -> None:
        """`facts` go into the fingerprint, `counts` into the report; `groups` and `paths` belong together."""
        self._request = request
        self._pad_id = pad_id
        self._groups = groups
        self._paths = paths
        self._order = Order(request, [group for _, group in groups], [group.weight for group in paths])
        self._facts = facts
        self._counts = counts

    def __len__(self) -> int:
        """Samples asked for; the data repeats in further epochs to reach any number."""
        return self._request.num_samples

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`; `BadSampleError` names conversations whose images or videos are corrupt."""
        group, numbers = self._order[index]
        return self._filled([(group, number) for number in numbers])

    @abstractmethod
    def _filled(self, chosen: list[tuple[int, int]]) -> Sample:
        """A sequence of these conversations: group and number of each."""

    @property
    def packed(self) -> list[Packed]:
        """Of each corpus the packs and where its conversations come from; empty without packing."""
        return [
            Packed(
                paths=entry.paths,
                caches=tuple(file.folder for file in stretch.files),
                kept=tuple(len(file) for file in stretch.files),
                first=stretch.first,
                lengths=stretch.lengths,
                packs=group.packs,
            )
            for entry, (stretch, group) in zip(self._paths, self._groups, strict=True)
            if group.packs is not None
        ]

    @property
    def conversations(self) -> int:
        """Conversations of one epoch."""
        return sum(len(stretch.lengths) for stretch, _ in self._groups)

    @property
    def left_out(self) -> list[Bad]:
        """Rows that cannot be used, found when they were tokenised."""
        return [bad for stretch, _ in self._groups for file in stretch.files for bad in left_out(file.folder)]

    def fingerprint(self) -> Mapping[str, str]:
        """Everything the order and the content of samples depend on."""
        return {"source": self.NAME, **self._facts, **settings(self._request)}

    def report(self) -> Mapping[str, Any]:
        """Rows and what became of them, tokens, sequences and how full they are, epochs of every corpus asked for."""
        units = self._order.units
        positions = sum(int((stretch.lengths - 1).sum()) for stretch, _ in self._groups)
        return {
            "source": self.NAME,
            "part": self._request.part,
            **self._counts,
            "used": self.conversations,
            "sequences": units,
            "filled": round(positions / (units * self._request.seq_length), 4),
            "samples": self._request.num_samples,
            "epochs": told_epochs(self._paths, self._order.epochs()),
        }
