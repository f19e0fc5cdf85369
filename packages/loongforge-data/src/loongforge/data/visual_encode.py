"""Conversations with images and videos to tokens: one token for each item, and where its features will stand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loongforge.core.data.contract import Placed, SoundProcessor, VisualItem, VisualProcessor
from loongforge.core.errors import DataError
from loongforge.data.accounts import UNTAUGHT, Answer
from loongforge.data.conversations import ChatRules
from loongforge.data.energon_folder import SampleFields
from loongforge.data.media import Kind, Medium, MissingLibraryError, decode, measure
from loongforge.data.overlong import settle
from loongforge.data.rows import Place, parse_row
from loongforge.data.shards import ShardSample
from loongforge.data.template import Span
from loongforge.data.turns import Encoded
from loongforge.data.visual_rows import RowReader, VisualRow

_HINT = "--overlong drop, truncate or split goes on; --max-pixels makes images smaller"

Source = tuple[Place, bytes | ShardSample]
"""A line of `.jsonl`, or a sample of a shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualRules:
    """What decides the tokens of a conversation with images, apart from the conversation."""

    chat: ChatRules
    processor: VisualProcessor
    folder: Path
    """Where relative paths begin."""
    verify: bool = False
    """Decode every medium."""
    fields: SampleFields | None = None
    """What a sample's messages and image are, where its folder says it."""
    may_leave_out: int | None = 0
    """Rows that may be bad; None: any number. Decides nothing about the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compact:
    """A conversation with one token for each item; `features` of it stand there in the end."""

    tokens: np.ndarray
    """int32 `[length]`."""
    assistant: np.ndarray
    """bool `[length]`: tokens that count; no item does."""
    merged: int
    places: np.ndarray
    """int64 `[items]`: where the items are in `tokens`, ascending."""
    placed: tuple[Placed, ...]
    """What each medium becomes, in order; their items together are those of `places`."""
    media: tuple[Medium, ...]

    @property
    def items(self) -> list[VisualItem]:
        """All items in order."""
        return [item for one in self.placed for item in one.items]

    @property
    def length(self) -> int:
        """Tokens with every feature."""
        return len(self.tokens) + sum(item.features - 1 for item in self.items)


def texts_of(processor: VisualProcessor) -> dict[Kind, str]:
    """What a template writes for every kind of medium that a processor prepares."""
    texts: dict[Kind, str] = {"image": processor.image_text, "video": processor.video_text}
    return {**texts, "audio": processor.sound_text} if isinstance(processor, SoundProcessor) else texts


class VisualEncoder:
    """Rows to tokens, masks and items; works in any process. Images are measured, not decoded."""

    def __init__(self, rules: VisualRules) -> None:
        self._rules = rules
        processor, chat = rules.processor, rules.chat
        self._finder = chat.finder()
        tokenizer = self._tokenizer = self._finder.tokenizer
        self._known = tokenizer.vocab_size
        self._reader = RowReader(
            messages_field=chat.messages_field,
            data_format=chat.data_format,
            texts=texts_of(processor),
            marks=processor.marks,
            fields=rules.fields,
        )
        self._marks = {mark: tokenizer.special_id(mark) for mark in processor.marks}
        self._places = re.compile(
            "|".join(f"(?P<{kind}>{re.escape(text)})" for kind, text in self._reader.texts.items())
        )

    def __call__(self, rows: list[Source]) -> Answer[Compact]:
        """Encode a batch; nothing is lost: each row is kept, or noted with a rule, or bad with a reason."""
        rules = self._rules.chat
        answer: Answer[Compact] = Answer()
        for place, source in rows:
            try:
                if isinstance(source, bytes):
                    row = self._reader.row(parse_row(source), self._rules.folder)
                else:
                    row = self._reader.sample(source)
                part = _Part(self, row)
                settle(answer, place, row, part, policy=rules.overlong, room=rules.seq_length + 1, hint=_HINT)
            except MissingLibraryError:  # no fault of the row
                raise
            except (ValueError, DataError) as error:
                answer.bad.append((place, str(error)))
        return answer

    def encode(self, row: VisualRow) -> Compact:
        """One conversation; `ValueError` or `DataError` says why it cannot be used."""
        media = tuple(medium for part in row.media for medium in part)
        placed = tuple(self._placed(medium) for medium in media)
        if self._rules.chat.train_on_prompt:
            return self._plain(row, media, placed)
        text, spans = self._finder.spans(row.messages, row.tools)
        return self._compact(self._finder.mark(*self._exchange(text, spans, media, placed)), media, placed)

    def _placed(self, medium: Medium) -> Placed:
        placed = measure(medium, self._rules.processor)
        if self._rules.verify:
            decoded = decode(medium, self._rules.processor)
            if [item.grid for item in decoded.items] != [item.grid for item in placed.items]:
                raise DataError(f"{medium}: its pixels have another size than its header says.")
        return placed

    def length(self, row: VisualRow) -> int:
        """Tokens of one conversation with every feature; no turn need be found."""
        media = tuple(medium for part in row.media for medium in part)
        placed = tuple(measure(medium, self._rules.processor) for medium in media)
        return self._plain(row, media, placed).length

    def _plain(self, row: VisualRow, media: tuple[Medium, ...], placed: tuple[Placed, ...]) -> Compact:
        """One conversation of which every token counts."""
        text, _ = self._exchange(self._finder.text(row.messages, row.tools), [], media, placed)
        tokens = np.array(self._tokenizer.encode(text), dtype=np.int32)
        return self._compact(Encoded(tokens, np.ones(len(tokens), dtype=bool), 0), media, placed)

    def _exchange(
        self, text: str, spans: list[Span], media: tuple[Medium, ...], placed: tuple[Placed, ...]
    ) -> tuple[str, list[Span]]:
        """Put in what each medium becomes, items as one placeholder, and move the spans along."""
        found = list(self._places.finditer(text))
        kinds = [match.lastgroup for match in found]
        if kinds != [medium.kind for medium in media]:
            raise ValueError(
                f"the chat template shows {len(found)} of {len(media)} images and videos; it must write "
                f"{self._reader.texts['image']!r} as it is and drop no message."
            )
        pieces: list[str] = []
        borders, shifts = [0], [0]
        last = 0
        for match, one in zip(found, placed, strict=True):
            written = "".join(piece if isinstance(piece, str) else piece.placeholder for piece in one.pieces)
            pieces += [text[last : match.start()], written]
            last = match.end()
            borders.append(last)
            shifts.append(shifts[-1] + len(written) - (match.end() - match.start()))
        pieces.append(text[last:])

        def moved(place: int) -> int:
            return place + shifts[int(np.searchsorted(borders, place, side="right")) - 1]

        return "".join(pieces), [(moved(start), moved(end)) for start, end in spans]

    def _compact(self, encoded: Encoded, media: tuple[Medium, ...], placed: tuple[Placed, ...]) -> Compact:
        tokens, assistant = encoded.tokens, encoded.assistant
        items = [item for one in placed for item in one.items]
        wanted = [self._marks[item.placeholder] for item in items]
        pads = sorted(set(wanted))
        keep = (tokens < self._known) | np.isin(tokens, pads)  # marks the tokenizer does not know are not written
        tokens, assistant = tokens[keep], assistant[keep]
        places = np.flatnonzero(np.isin(tokens, pads))
        if tokens[places].tolist() != wanted:
            raise ValueError(f"{len(places)} placeholders among the tokens of {len(items)} images and video frames.")
        tokens = np.where(tokens < self._known, tokens, 0).astype(np.int32)
        assistant[places] = False
        return Compact(
            tokens=tokens, assistant=assistant, merged=encoded.merged, places=places, placed=placed, media=media
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """One row, of which some messages may be taken with their media."""

    encoder: VisualEncoder
    row: VisualRow

    def encode(self, numbers: list[int]) -> Compact:
        """Tokens and items of the conversation made of these messages."""
        return self.encoder.encode(self.row.of(numbers))

    def length(self, numbers: list[int]) -> int:
        """Its tokens with every feature."""
        return self.encoder.length(self.row.of(numbers))

    def size(self, one: Compact) -> int:
        """Tokens of one that is encoded."""
        return one.length

    def unfit(self, one: Compact) -> str | None:
        """Nothing is learned from one in which nothing counts; features at the very end have no label."""
        if not one.assistant[1:].any():
            return UNTAUGHT
        return "ends with an image" if len(one.places) and one.places[-1] == len(one.tokens) - 1 else None
