"""Every row of a file is accounted for: kept as it is, or named with the rule that dropped, cut or split it, or with
the reason why it cannot be used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Self

from loongforge.core.data.quarantine import Bad
from loongforge.core.errors import DataError
from loongforge.data.rows import Place

FILE = "dropped.jsonl"
"""Beside the arrays of a cache: a line for every row that is not trained on as it is."""
NAMED = 5
"""Rows that a report names itself."""
TOO_LONG = "too long"
UNTAUGHT = "no token to learn"
QUARANTINED = "quarantined"
Done = Literal["dropped", "truncated", "split", "quarantined"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A row that is not trained on as it is."""

    path: str
    row: int | str
    """Its line or number from 1, or its key in a shard."""
    done: Done
    rule: str
    """Why: `too long`, `no token to learn`, or what is wrong with a row that is quarantined."""
    tokens: int = 0
    """Of the whole conversation; 0 of one that is quarantined."""
    pieces: int = 0
    """Conversations that were made of it."""
    lost_messages: int = 0
    """Messages that are in none of them; 0 of one that is quarantined."""

    def __str__(self) -> str:
        """`rows.jsonl:3: too long`."""
        return f"{self.path}:{self.row}: {self.rule}"


@dataclass(slots=True)
class Answer[E]:
    """What became of a batch of rows."""

    rows: int = 0
    """All of them but bad ones."""
    forms: Counter[str] = field(default_factory=Counter)
    kept: list[E] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    """Where each of those stands."""
    notes: list[Note] = field(default_factory=list)
    bad: list[tuple[Place, str]] = field(default_factory=list)


class Accounts:
    """Counts rows by what became of them, and writes the notes of those that were changed."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._stream: IO[str] | None = None
        self._planned = self._rows = self._bad = self._pieces = 0
        self._forms: Counter[str] = Counter()
        self._done: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._lines: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def planned[T](self, rows: Iterable[T]) -> Iterator[T]:
        """The rows as they go out to be encoded, counted."""
        for row in rows:
            self._planned += 1
            yield row

    def add(self, answer: Answer[Any]) -> None:
        """One batch."""
        self._rows += answer.rows
        self._bad += len(answer.bad)
        self._forms.update(answer.forms)
        for note in answer.notes:
            self._note(note)

    def _note(self, note: Note) -> None:
        self._done[note.done] += 1
        self._pieces += note.pieces
        if note.done == "dropped":
            self._dropped[note.rule] += 1
            if len(self._lines) < NAMED:
                self._lines.append(str(note))
        if self._stream is None:
            self._stream = open(self._file, "w", encoding="utf-8")  # noqa: SIM115  closed at the end
        self._stream.write(json.dumps(asdict(note), ensure_ascii=False) + "\n")

    def summary(self, where: str, kept: int, bad: Sequence[Bad] = ()) -> dict[str, Any]:
        """Facts for a report; `bad` are quarantined. `DataError` when there are no rows, when `kept`, the conversations
        to train on, is 0, or when a row is neither kept nor named."""
        for one in bad:
            self._note(Note(path=one.file, row=one.row, done=QUARANTINED, rule=one.reason))
        rows = self._rows + len(bad)
        if not rows:
            raise DataError(f"{where} holds no conversation.")
        if not kept:
            named = [*self._lines, *map(str, bad)][:NAMED]
            raise DataError(f"{where}: none of {rows} conversations can be used: {'; '.join(named)}.")
        made = rows - sum(self._done.values()) + self._pieces
        if made != kept or self._planned != self._rows + self._bad:
            raise DataError(
                f"{where}: {self._planned} rows were read and {self._rows + self._bad} answered; they make {made} "
                f"conversations, and {kept} are kept. Please report it."
            )
        return {
            "rows": rows,
            "forms": dict(self._forms),
            "truncated": self._done["truncated"],
            "split": self._done["split"],
            "quarantined": len(bad),
            "conversations": kept,
            "dropped": dict(self._dropped),
            "dropped_lines": self._lines,
            "noted": sum(self._done.values()),
        }


class Told:
    """The facts of several caches as one report."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._forms: Counter[str] = Counter()
        self._lines: list[str] = []
        self._files: list[str] = []

    def add(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """The facts of one cache: of `Accounts`, and counts of what was written."""
        counts = {name: value for name, value in facts.items() if isinstance(value, int)}
        self._files += [str(folder / FILE)] if counts.pop("noted") else []
        self._counts.update(counts)
        self._counts.update({f"dropped ({rule})": count for rule, count in facts["dropped"].items()})
        self._forms.update(facts["forms"])
        self._lines += facts["dropped_lines"]

    def report(self) -> dict[str, Any]:
        """Counts, formats, the first rows that were dropped, and the files that name all that were not kept whole."""
        told: dict[str, Any] = dict(self._counts)
        told["formats"] = ", ".join(f"{form} {count}" for form, count in sorted(self._forms.items()))
        if self._lines:
            told["dropped_rows"] = self._lines[:NAMED]
        if self._files:
            told["all_named_in"] = self._files
        return told


def left_out(folder: Path) -> list[Bad]:
    """The rows of a cache that could not be used."""
    if not (folder / FILE).is_file():
        return []
    with open(folder / FILE, encoding="utf-8") as stream:
        notes = [json.loads(line) for line in stream]
    return [
        Bad(file=note["path"], row=note["row"], reason=note["rule"]) for note in notes if note["done"] == QUARANTINED
    ]
