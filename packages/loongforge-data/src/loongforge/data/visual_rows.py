"""Rows with images, videos and sounds, in the forms data sets have, as one: messages of text, and their media."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loongforge.data.energon_folder import SampleFields
from loongforge.data.files import Files
from loongforge.data.formats import AUTO, Conversation, read_conversation
from loongforge.data.media import Kind, Medium, kind_of
from loongforge.data.shards import ShardSample
from loongforge.data.template import Message

Lookup = Callable[[str, Kind], Medium]
"""From a name in a row to the medium it names; `ValueError` when there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualRow(Conversation):
    """A conversation whose contents are text; where a medium stands, it says what a template writes for one."""

    media: tuple[tuple[Medium, ...], ...]
    """Of each message, in the order of its text."""

    def of(self, numbers: list[int]) -> VisualRow:
        """Some of the messages with their media."""
        chosen = [self.messages[number] for number in numbers]
        return replace(self, messages=chosen, media=tuple(self.media[number] for number in numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """Reads rows of one run: which field holds messages, and what stands for a medium in them."""

    messages_field: str
    texts: Mapping[Kind, str]
    """What a template writes for each kind of medium that the model knows."""
    marks: tuple[str, ...]
    """Special tokens of those; a message's own text may hold none of them."""
    data_format: str = AUTO
    fields: SampleFields | None = None
    """What a sample's messages and image are, where its folder says it; else its json does."""
    files: Files = field(default_factory=Files)
    """Shards that are read."""

    @property
    def places(self) -> dict[str, Kind]:
        """What stands for a medium in a message: `<image>`, `<video>` and, to a model that hears, `<audio>`."""
        return {f"<{kind}>": kind for kind in self.texts}

    def row(self, row: dict[str, Any], folder: Path) -> VisualRow:
        """A row of a `.jsonl` file, whose relative paths begin at `folder`; `ValueError` says what is wrong."""
        return self._row(row, lambda name, kind: _file(name, kind, folder))

    def sample(self, sample: ShardSample) -> VisualRow:
        """A sample of a shard; its media are members of the same key, whatever their names say."""

        def find(name: str, kind: Kind) -> Medium:
            found = sample.find(name) or sample.find(name.removeprefix(f"{sample.key}."))
            if found is None:
                raise ValueError(
                    f"{kind} {name!r} is not among the members "
                    f"{', '.join(one.extension for one in sample.members)} of its sample."
                )
            return _member(sample, found.extension, kind)

        if self.fields is not None:
            return self._row(self.fields.row(sample, lambda name: self._read(sample, name), self.messages_field), find)
        said = self._read(sample, "json")
        try:
            content = json.loads(said)
        except ValueError as error:
            raise ValueError(f"its json cannot be read: {error}.") from error
        return self._row(self._unified(content, sample), find)

    def _read(self, sample: ShardSample, extension: str) -> bytes:
        member = sample.find(extension)
        if member is None:
            raise ValueError(f"no {extension} among {', '.join(one.extension for one in sample.members)}.")
        return sample.read(member, self.files)

    def _unified(self, content: Any, sample: ShardSample) -> dict[str, Any]:
        """A row with messages and lists of media out of the layouts that shards come in."""
        media: dict[Kind, list[str]] = {kind: [] for kind in self.texts}
        for member in sample.members:
            if (kind := kind_of(f"x.{member.extension}")) is not None and kind in self.texts:
                media[kind].append(member.extension)
        if isinstance(content, list):  # VQA: question and answer
            return self._asked(content, media)
        if not isinstance(content, dict):
            raise ValueError(f"its json holds {type(content).__name__}, not an object or a list of messages.")
        if "captions" in content:
            captions = content["captions"]
            if not isinstance(captions, list) or not captions or not isinstance(captions[0], dict):
                raise ValueError("field 'captions' must be a list of objects with content.")
            return self._asked([{"content": ""}, captions[0]], media)
        if "media_files" in content or isinstance(content.get("texts"), dict):
            raise ValueError("it is packed already (media_files); give the shards from before packing.")
        row = dict(content)
        if "texts" in row and self.messages_field not in row:
            row[self.messages_field] = row.pop("texts")
        if isinstance(row.get("name"), list):
            named: dict[Kind, list[str]] = {kind: [] for kind in self.texts}
            for name in row["name"]:
                kind = kind_of(str(name))
                if kind is None or kind not in self.texts:
                    raise ValueError(f"{name!r} is none of {', '.join(self.texts)} by its name.")
                named[kind].append(str(name))
            media = named
        for kind, names in media.items():
            if f"{kind}s" not in row and kind not in row:
                row[f"{kind}s"] = names
        row.pop("media", None)
        return row

    def _asked(self, turns: list[Any], media: dict[Kind, list[str]]) -> dict[str, Any]:
        """Turns that take turns; media nobody mentions stand before the first."""
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(turns):
            if not isinstance(turn, dict):
                raise ValueError(f"message {number} is {type(turn).__name__}, not an object with content.")
            roles = ("user", "assistant")
            messages.append({"role": roles[number % 2], **turn} if "from" not in turn else turn)
        said = json.dumps(turns)
        if messages and not any(mark in said for mark in self.places):
            ahead = "".join(mark * len(media[kind]) for mark, kind in self.places.items())
            said_in = "value" if "value" in messages[0] else "content"
            messages[0] = {**messages[0], said_in: ahead + str(messages[0].get(said_in) or "")}
        return {self.messages_field: messages, **{f"{kind}s": names for kind, names in media.items()}}

    def _row(self, row: dict[str, Any], find: Lookup) -> VisualRow:
        said = read_conversation(row, self.data_format, self.messages_field)
        if "audio" not in self.texts and row.get("audios"):
            raise ValueError("it lists audios, and this model hears none: take them out of the data.")
        waiting: dict[Kind, list[str]] = {kind: _names(row, kind) for kind in self.texts}
        given: dict[Kind, int] = {kind: len(names) for kind, names in waiting.items()}
        messages: list[Message] = []
        media: list[tuple[Medium, ...]] = []
        wanted: dict[Kind, int] = dict.fromkeys(self.texts, 0)
        for number, message in enumerate(said.messages):
            content = _Content(reader=self, waiting=waiting, find=find, wanted=wanted)
            messages.append(self._message(message, number, content))
            media.append(tuple(content.media))
        for kind, names in waiting.items():
            if names or wanted[kind] > given[kind]:
                raise ValueError(
                    f"{wanted[kind]} places for {kind}s in the messages (<{kind}>), {given[kind]} in the list "
                    f"'{kind}s': every one needs its own."
                )
        return VisualRow(messages=messages, tools=said.tools, form=said.form, media=tuple(media))

    def _message(self, message: Message, number: int, content: _Content) -> Message:
        said = message.get("content")
        if said is None:
            return message
        if isinstance(said, str):
            return {**message, "content": content.of_text(said)}
        if not isinstance(said, list):
            raise ValueError(f"message {number}: content is {type(said).__name__}, not text or a list of parts.")
        return {**message, "content": "".join(content.of_part(part, number) for part in said)}


@dataclass(slots=True, kw_only=True)
class _Content:
    """Turns one message's content into text and collects its media."""

    reader: RowReader
    waiting: dict[Kind, list[str]]
    find: Lookup
    wanted: dict[Kind, int]
    """Media that messages asked for out of the row's lists."""
    media: list[Medium] = field(default_factory=list)

    def of_text(self, text: str) -> str:
        """Text with `<image>`, `<video>` and `<audio>` exchanged for what a template writes."""
        places = self.reader.places
        pieces = re.split(f"({'|'.join(places)})", text)
        kinds: list[Kind | None] = [places.get(piece) for piece in pieces]
        return "".join(
            self._next(kind) if kind else self._plain(piece) for piece, kind in zip(pieces, kinds, strict=True)
        )

    def of_part(self, part: Any, number: int) -> str:
        """One part of a content list: `{"type": "text" | "image_url" | "image" | ..., ...}`, text literal."""
        if not isinstance(part, dict):
            raise ValueError(f"message {number}: a part of its content is {type(part).__name__}, not an object.")
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            return self._plain(part["text"])
        if kind == "image_url":
            url = part.get("image_url")
            return self._named(str(url.get("url") if isinstance(url, dict) else url), "image")
        if medium := self.reader.places.get(f"<{kind}>"):
            name = part.get(medium, part.get("path"))
            return self._next(medium) if name is None else self._named(str(name), medium)
        raise ValueError(
            f"message {number}: a part of type {kind!r} is not known: text, image_url, "
            f"{' or '.join(self.reader.texts)}, each with its field."
        )

    def _next(self, kind: Kind) -> str:
        self.wanted[kind] += 1
        names = self.waiting[kind]
        return self._named(names.pop(0), kind) if names else ""

    def _named(self, name: str, kind: Kind) -> str:
        self.media.append(self.find(name, kind))
        return self.reader.texts[kind]

    def _plain(self, text: str) -> str:
        for mark in self.reader.marks:
            if mark in text:
                raise ValueError(f"a message's text holds {mark!r}, which marks where images stand; write <image>.")
        return text


def _names(row: dict[str, Any], kind: Kind) -> list[str]:
    """Media a row lists, under the plural or the singular field."""
    for name in (f"{kind}s", kind):
        value = row.get(name)
        if value is None:
            continue
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(one, str) and one for one in values):
            raise ValueError(f"field {name!r} must be a path or a list of paths.")
        return list(values)
    return []


def _file(name: str, kind: Kind, folder: Path) -> Medium:
    """A file beside the data; a relative path may not lead out of the data's folder."""
    name = name.removeprefix("file://")
    if "://" in name or name.startswith("data:"):
        raise ValueError(f"{kind} {name[:60]!r}: only files are read; download it and give its path.")
    if os.path.isabs(name):
        return Medium(kind=kind, path=name)
    if os.path.normpath(name).startswith(".."):
        raise ValueError(f"{kind} {name!r} leads out of the data's folder {folder}.")
    return Medium(kind=kind, path=str(folder / name))


def _member(sample: ShardSample, extension: str, kind: Kind) -> Medium:
    member = sample.find(extension)
    assert member is not None, "the caller has found it"
    name = f"{sample.key}.{extension}"
    place = {"path": sample.shard, "offset": member.offset, "size": member.size}
    return Medium(kind=kind, name=name, extent=member.extent, **place)
