"""Conversations that cannot be used: how many a run bears, which they are, and what all ranks know of them.

A rank that fails to read a conversation must not be alone with that: the rank that computes the loss may never look at
pixels. With a budget, every optimizer step therefore begins with one sum over all ranks of what each could not read. It
is nearly always zero; otherwise all ranks learn the names, and each puts an empty place where the conversation was.
Without a budget nothing is exchanged, and the first bad sample ends the run.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from loongforge.core.checkpoint.directory import write_text
from loongforge.core.data.contract import Measured, Sample, SampleSource
from loongforge.core.errors import DataError

SHOWN = 5
"""Bad conversations that an error names; the file has all."""
Document = tuple[int, ...]
"""A source's own numbers of a conversation: a row of `Contents.documents`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many conversations may be bad. With none of the three the first one ends the run; each given one holds."""

    samples: int | None = None
    """Over the whole run, each counted once."""
    ratio: float | None = None
    """Of all conversations."""
    run: int | None = None
    """Samples of the training order, one after the other."""

    def __bool__(self) -> bool:
        """Whether any may be bad."""
        return any(limit is not None for limit in (self.samples, self.ratio, self.run))

    def passed(self, bad: int, total: int, run: int = 0) -> str | None:
        """Which limit `bad` of `total` conversations, `run` of them in a row, pass; None within all."""
        if not self and bad:
            return f"{bad} bad, and none is allowed: --max-bad-samples N goes on without up to N"
        if self.samples is not None and bad > self.samples:
            return f"{bad} bad, --max-bad-samples {self.samples} allows no more"
        if self.ratio is not None and bad > self.ratio * total:
            return f"{bad} of {total} bad, --max-bad-ratio {self.ratio:g} allows no more"
        if self.run is not None and run > self.run:
            return f"{run} samples in a row bad, --max-bad-run {self.run} allows no more"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """A conversation that cannot be used."""

    file: str
    row: int | str
    """Its line, or its key in a shard."""
    reason: str

    def __str__(self) -> str:
        """`rows.jsonl:3: why`."""
        return f"{self.file}:{self.row}: {self.reason}"


class BadSampleError(DataError):
    """A sequence some of whose conversations cannot be read."""

    def __init__(self, bad: Mapping[Document, Bad]) -> None:
        self.bad = dict(bad)
        super().__init__("; ".join(map(str, bad.values())))


@runtime_checkable
class Accounted(SampleSource, Protocol):
    """A source that names the conversations it has left out."""

    @property
    def conversations(self) -> int:
        """Conversations of one epoch."""
        ...

    @property
    def left_out(self) -> Sequence[Bad]:
        """Those that could not be used when the source was opened; no sample has them."""
        ...


@runtime_checkable
class Forgiving(Measured, Protocol):
    """A source that can leave conversations of a sample out later; `fill` raises `BadSampleError`."""

    def fill_without(self, documents: np.ndarray, left_out: Collection[Document]) -> Sample:
        """As `fill`, with an empty place, loss_mask 0 and no items, where those of `left_out` were."""
        ...


class Peers(Protocol):
    """What is needed of all ranks: see `World`."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """One value of every rank, in order."""
        ...

    def total(self, count: int) -> int:
        """A sum over all ranks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Bad):
    """One line of `quarantine.jsonl`."""

    part: str | None = None
    """`train` or `valid`; None when it was found before training."""
    step: int | None = None
    """Optimizer step, from 1."""
    sample: int | None = None
    """Number of the sample that it belongs to."""
    rank: int | None = None
    """The first rank that could not read it."""


class Quarantine:
    """What the run has found bad so far; the same on every rank."""

    def __init__(self, budget: Budget, peers: Peers, file: Path | None = None) -> None:
        """`file` is written by the main rank whenever there is news; None without `--save`."""
        self.budget = budget
        self._peers, self._file = peers, file
        self._entries: dict[tuple[str, int | str], Entry] = {}
        self._total = 0
        self._last, self._run = -1, 0

    def __len__(self) -> int:
        """Conversations in quarantine."""
        return len(self._entries)

    def __str__(self) -> str:
        """`Quarantine: 3 of 40 conversations cannot be used; runs/a/quarantine.jsonl names them.`"""
        where = f"{self._file} names them" if self._file else "the file dropped.jsonl of the data cache names them"
        return f"Quarantine: {len(self)} of {self._total} conversations cannot be used; {where}."

    def numbers(self) -> dict[str, float]:
        """`quarantined`, for the line of a step; nothing while there is none."""
        return {"quarantined": float(len(self))} if self._entries else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint knows."""
        self._note(Entry(**row) for row in state.get("entries", ()))
        self._last, self._run = state.get("last", -1), state.get("run", 0)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what was found while training; empty without anything."""
        found = [asdict(entry) for entry in self._entries.values() if entry.part]
        return {"entries": found, "last": self._last, "run": self._run} if found else {}

    def begin(self, sources: Iterable[SampleSource]) -> None:
        """Count what sources have left out already; `DataError` when that is more than the budget bears."""
        for source in sources:
            if isinstance(source, Accounted):
                self._note(Entry(file=bad.file, row=bad.row, reason=bad.reason) for bad in source.left_out)
                self._total += source.conversations
            elif self.budget:
                raise DataError(
                    "data.max_bad_samples, max_bad_ratio, max_bad_run: this source leaves nothing out, of ours 'chat' "
                    "and 'vlm' do. Drop them, or give the source what core.data.quarantine.Accounted lists."
                )
        self._total += len(self._entries)
        self._write()
        self._check()

    def settle(self, part: str, step: int, found: Mapping[Document, tuple[int, Bad]]) -> set[Document]:
        """Conversations of this step that some rank could not read. Collective.

        `found` are this rank's, each with the number of its sample. Over budget every rank raises the same `DataError`.
        """
        if not self._peers.total(len(found)):
            return set()
        told = [
            (sample, document, rank, one)
            for rank, theirs in enumerate(self._peers.gather(dict(found)))
            for document, (sample, one) in theirs.items()
        ]
        for sample, _, rank, one in sorted(told, key=lambda entry: entry[:3]):  # the same order on any layout
            place = {"part": part, "step": step, "sample": sample, "rank": rank}
            self._note([Entry(file=one.file, row=one.row, reason=one.reason, **place)])
        self._write()
        for number in sorted({sample for sample, *_ in told}) if part == "train" else ():
            self._run = self._run + 1 if number == self._last + 1 else 1
            self._last = number
            self._check()
        self._check()
        return {document for _, document, *_ in told}

    def _note(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._entries.setdefault((entry.file, entry.row), entry)

    def _check(self) -> None:
        problem = self.budget.passed(len(self._entries), self._total, self._run)
        if problem is None:
            return
        entries = list(self._entries.values())
        late = entries[-1].part is not None
        named = [str(entry) for entry in (entries[-SHOWN:] if late else entries[:SHOWN])]
        where = f"{self._file} names all. " if self._file and len(entries) > SHOWN else ""
        remedy = "Repair or remove them" + ("" if late else " and delete the data cache")
        raise DataError(*named, f"Bad conversations: {problem}. {where}{remedy}.")

    def _write(self) -> None:
        if self._file and self._peers.is_main and (self._entries or self._file.exists()):
            write_text(self._file, "".join(json.dumps(asdict(entry)) + "\n" for entry in self._entries.values()))
