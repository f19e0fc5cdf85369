"""What files of rows or shards hold, row by row: turns, media, lengths, and every row that cannot be used, by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from loongforge.core.data.contract import Clip, Placed, VisualProcessor
from loongforge.core.errors import DataError
from loongforge.data.conversations import ChatEncoder, ChatRules
from loongforge.data.energon_folder import EnergonFolder, SampleFields
from loongforge.data.engine import Engine
from loongforge.data.index import glance
from loongforge.data.media import Medium, measure
from loongforge.data.progress import progress
from loongforge.data.row_files import TABLES, read_rows
from loongforge.data.rows import BadRows, Place, parse_row, text_of
from loongforge.data.shards import ShardSample
from loongforge.data.tokenise import batched
from loongforge.data.visual_encode import VisualEncoder, VisualRules
from loongforge.data.visual_file import sources
from loongforge.data.visual_rows import RowReader, VisualRow

ENDLESS = 1 << 40
"""Longer than any row: a survey measures, it leaves nothing out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyRules:
    """How rows are read and, with a tokenizer, measured."""

    messages_field: str = "messages"
    text_field: str = "text"
    chat: ChatRules | None = None
    """Tokenizer and template; None: no row has a length."""
    processor: VisualProcessor | None = None
    """Says what images become; None: rows with media have no length, but their files are looked at."""
    folder: Path = Path()
    """Where relative paths of media begin."""
    fields: SampleFields | None = None
    """What a sample's messages and image are, where its folder says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyedRow:
    """One row."""

    place: Place
    size: int = 0
    """Bytes read for it."""
    text_bytes: int = 0
    turns: int = 0
    """Messages; 0 in a row that is a text."""
    images: int = 0
    videos: int = 0
    audios: int = 0
    length: int | None = None
    """Tokens, features of its media included; None where they are not known."""
    grids: tuple[tuple[int, int, int], ...] = ()
    """(t, h, w) in patches of all items."""
    bad: str = ""
    """Why it cannot be used."""


@dataclass(slots=True)
class Survey:
    """All rows of some files; one number of each row in each list, bad rows left out."""

    text_bytes: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    videos: list[int] = field(default_factory=list)
    audios: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Of the rows whose length is known."""
    grids: list[tuple[tuple[int, int, int], ...]] = field(default_factory=list)
    """Of the same rows."""
    bad: list[tuple[Place, str]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows, bad ones included."""
        return len(self.turns) + len(self.bad)

    def add(self, row: SurveyedRow) -> None:
        """Count a row."""
        if row.bad:
            self.bad.append((row.place, row.bad))
            return
        for name in ("text_bytes", "turns", "images", "videos", "audios"):
            getattr(self, name).append(getattr(row, name))
        if row.length is not None:
            self.lengths.append(row.length)
            self.grids.append(row.grids)


Item = tuple[Place, bytes | ShardSample | str]
"""A line, a sample, or the reason why nothing can be read from here on."""


def survey(paths: Sequence[Path], rules: SurveyRules, engine: Engine) -> Survey:
    """Look at every row of files of rows, `.tar` shards and folders of either.

    What is wrong is named and does not end the survey. `DataError` for a path that is absent or of another kind.
    """
    files = [file for path in paths for file in sources(str(path))]
    prepared = EnergonFolder.open(paths[0])
    rules = rules if prepared is None else replace(rules, fields=prepared.fields)
    found = Survey()
    with progress(f"looking at {paths[0].name}", sum(os.path.getsize(file) for file in files)) as advance:
        items = (item for file in files for item in _items(file))
        for answers in engine.map(Surveyor, (rules,), batched(items)):
            for row in answers:
                found.add(row)
            advance(sum(row.size for row in answers))
    return found


def nth_row(path: Path, number: int) -> tuple[Place, bytes | None, int]:
    """Row `number`, from 1, of a `.jsonl` or `.parquet` file, and how many there are up to it; None beyond the last."""
    place, rows = Place(str(path), number), 0
    for place, source in _items(path):
        if not isinstance(source, bytes):
            raise DataError(str(source))
        rows += 1
        if rows == number:
            return place, source, rows
    return place, None, rows


class Surveyor:
    """Rows to what they hold; works in any process."""

    def __init__(self, rules: SurveyRules) -> None:
        self._rules = rules
        self._reader = RowReader(
            messages_field=rules.messages_field,
            texts={"image": "", "video": "", "audio": ""},
            marks=(),
            fields=rules.fields,
        )
        self._tokenizer = None if rules.chat is None else rules.chat.choice.open()

    @cached_property
    def _chat(self) -> ChatEncoder | None:
        """Made for the first conversation: documents need no chat template."""
        return None if self._rules.chat is None else ChatEncoder(self._rules.chat)

    @cached_property
    def _visual(self) -> VisualEncoder | None:
        chat, processor = self._rules.chat, self._rules.processor
        if chat is None or processor is None:
            return None
        rules = VisualRules(chat=chat, processor=processor, folder=self._rules.folder, fields=self._rules.fields)
        return VisualEncoder(rules)

    def __call__(self, items: list[Item]) -> list[SurveyedRow]:
        """One answer for every item, bad ones with the reason."""
        answers: list[SurveyedRow] = []
        for place, source in items:
            try:
                answers.append(replace(self._row(place, source), size=_size(source)))
            except (ValueError, DataError) as error:
                answers.append(SurveyedRow(place=place, bad=str(error)))
        return answers

    def _row(self, place: Place, source: bytes | ShardSample | str) -> SurveyedRow:
        if isinstance(source, str):
            raise DataError(source)
        if isinstance(source, ShardSample):
            return self._conversation(place, self._reader.sample(source), source)
        content = parse_row(source)
        conversation = (self._rules.messages_field, "conversations", "instruction")
        if content.get(self._rules.text_field) and not any(content.get(name) for name in conversation):
            text = text_of(content, self._rules.text_field)
            length = None if self._tokenizer is None else len(self._tokenizer.encode(text))
            return SurveyedRow(place=place, text_bytes=len(text.encode()), length=length)
        return self._conversation(place, self._reader.row(content, self._rules.folder), source)

    def _conversation(self, place: Place, row: VisualRow, source: bytes | ShardSample) -> SurveyedRow:
        media = [medium for part in row.media for medium in part]
        length, grids = self._measured(place, source, media)
        kinds = [medium.kind for medium in media]
        return SurveyedRow(
            place=place,
            text_bytes=sum(len(_text(message).encode()) for message in row.messages),
            turns=len(row.messages),
            images=kinds.count("image"),
            videos=kinds.count("video"),
            audios=kinds.count("audio"),
            length=length,
            grids=grids,
        )

    def _measured(
        self, place: Place, source: bytes | ShardSample, media: list[Medium]
    ) -> tuple[int | None, tuple[tuple[int, int, int], ...]]:
        """Tokens and grids; `ValueError` or `DataError` for a row that training would refuse."""
        if self._visual is None:
            for medium in media:
                if medium.kind != "audio":  # what a sound becomes is for a model that hears to say
                    measure(medium, cast(VisualProcessor, _Look()))
        if self._visual is not None:
            answer = self._visual([(place, source)])
            lengths = [one.length for one in answer.kept]
            grids = tuple(item.grid for one in answer.kept for item in one.items)
        elif self._chat is not None and not media and isinstance(source, bytes):
            answer, grids = self._chat([(place, source)]), ()
            lengths = [len(one.tokens) for one in answer.kept]
        else:
            return None, ()
        for reason in (*(reason for _, reason in answer.bad), *(note.rule for note in answer.notes)):
            raise ValueError(reason)
        return sum(lengths), grids


class _Look:
    """Stands for a `VisualProcessor` where only the headers of files are of interest."""

    def image_size(self, height: int, width: int) -> Placed:
        """Nothing."""
        return Placed(pieces=())

    def video_size(self, clip: Clip) -> Placed:
        """Nothing."""
        return Placed(pieces=())


def _size(source: bytes | ShardSample | str) -> int:
    return sum(member.size for member in source.members) if isinstance(source, ShardSample) else len(source)


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _items(path: Path) -> Iterator[Item]:
    place: int | str = 0
    try:
        if path.suffix == ".tar":
            index = glance(path)
            yield from ((Place(str(path), one.place), one.reason) for one in index.problems)
            yield from ((Place(str(path), sample.key), sample) for sample in index)
        elif path.suffix in TABLES:
            for place, line in read_rows(path, BadRows()):
                yield Place(str(path), place), line
        else:
            with open(path, "rb") as stream:
                for place, line in enumerate(stream, start=1):
                    if line.strip():
                        yield Place(str(path), place), line
    except DataError as error:
        yield Place(str(path), f"after {place}"), str(error)
