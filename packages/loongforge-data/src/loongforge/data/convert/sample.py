"""A row to a sample: its key, its json, and the files that stand beside it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from tarfile import LENGTH_NAME
from typing import Any

from loongforge.data.convert.files import part_name, resolve, suffix_of
from loongforge.data.convert.messages import (
    KINDS,
    MediumKind,
    check_messages,
    gather,
    listed,
    misfits,
    speaker,
    text_of,
)
from loongforge.data.convert.options import ConvertOptions
from loongforge.data.convert.rows import Row
from loongforge.data.rows import take_field

_IN_KEYS = re.compile(r"[\x00-\x20\x7f./\\]")
"""A dot ends a key; the others do not belong in a file's name."""
_LONGEST_KEY = 200
_TAKEN = (
    "texts", "messages", "media", "name", "captions", "media_files", "image", "images", "video", "videos",
)  # fmt: skip
"""Fields that mean something in a sample; a column of that name which is something else goes under `columns`."""
_BLOCK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """An image or a video of a sample."""

    kind: MediumKind
    path: str
    size: int
    """Bytes, when the row was read."""
    name: str
    """What stands behind the key in the name of the member."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a row becomes, all but the content of its files."""

    row: int
    line: int | None
    read: int
    """Bytes of the input that it was."""
    key: str
    texts: tuple[tuple[str, bytes], ...]
    """Members that are made of the row: `json`, and `extra.json` where that has no place for other columns."""
    parts: tuple[Part, ...]
    note: str = ""
    """What looks wrong and is no reason to leave the row out."""

    @property
    def size(self) -> int:
        """Bytes of an archive that it takes."""
        members = [(name, len(content)) for name, content in self.texts]
        members += [(part.name, part.size) for part in self.parts]
        return sum(_member_size(f"{self.key}.{name}", size) for name, size in members)


def key_of(row: Row, options: ConvertOptions) -> str:
    """The key of a row: its `id` without dots and slashes, or `row_NUMBER`."""
    given = row.value.get("id") if options.key == "id" and isinstance(row.value, dict) else None
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        return f"row_{row.number}"
    key = _IN_KEYS.sub("_", str(given))
    return f"id{key}" if key.startswith("__") else key  # webdataset takes names with __ for notes of its own


def sample_of(row: Row, options: ConvertOptions) -> Sample:
    """The sample a row becomes; `ValueError` says why it cannot become one."""
    if row.problem:
        raise ValueError(row.problem)
    content: dict[str, Any] = row.value
    key = key_of(row, options)
    if len(key.encode()) > _LONGEST_KEY:
        raise ValueError(f"its id is longer than {_LONGEST_KEY} bytes; --key row numbers samples instead.")
    if content.get("audio") or content.get("audios"):
        raise ValueError("it lists sounds, which are not converted.")
    said = take_field(content, options.columns_messages, "--columns_messages")
    if isinstance(said, str) and options.sample_type == "caption":
        said = [{"role": "assistant", "content": said}]
    messages = check_messages(said, options.columns_messages)
    messages, media = gather(messages, {kind: listed(content, kind) for kind in KINDS})
    for kind, name in media:
        if options.media not in ("mix", kind):
            raise ValueError(f"{kind} {name!r} in a conversion with --media {options.media}; --media mix takes both.")
    parts = tuple(_part(place, kind, name, options) for place, (kind, name) in enumerate(media))
    read = {options.columns_messages, *(name for kind in KINDS for name in (kind, f"{kind}s"))}
    left = {name: value for name, value in content.items() if name not in read}
    make = {"vqa": _vqa, "caption": _caption}.get(options.sample_type, _conversation)
    texts, parts = make(messages, parts, left, options)
    note = misfits(messages, media) if make is _conversation else ""
    return Sample(
        row=row.number,
        line=row.line,
        read=row.size,
        key=key,
        texts=tuple((name, _json(value)) for name, value in texts.items()),
        parts=parts,
        note=note,
    )


Members = tuple[dict[str, Any], tuple[Part, ...]]


def _conversation(
    messages: list[dict[str, Any]], parts: tuple[Part, ...], left: dict[str, Any], options: ConvertOptions
) -> Members:
    """Any number of turns, images and videos."""
    kinds = {part.kind for part in parts}
    chat = options.sample_type == "chat_mix"
    body = {
        "messages" if chat else "texts": messages,
        "media": "text" if not kinds else "mix" if len(kinds) > 1 else kinds.pop(),
        "name": [part.name for part in parts],
    }
    return {"json": {**body, **_columns(left)}}, parts


def _vqa(
    messages: list[dict[str, Any]], parts: tuple[Part, ...], left: dict[str, Any], options: ConvertOptions
) -> Members:
    """An image, a question and an answer."""
    if len(messages) != 2 or left.get("tools") or left.get("system"):
        raise ValueError(
            f"sample type vqa is one question and one answer; this row has {len(messages)} messages"
            f"{' and tools or system' if left.get('tools') or left.get('system') else ''}: use multi_mix_qa."
        )
    plain = [{**message, "content": text_of(message)} for message in messages]
    return {"json": plain, **({"extra.json": left} if left else {})}, _one_image(parts, options)


def _caption(
    messages: list[dict[str, Any]], parts: tuple[Part, ...], left: dict[str, Any], options: ConvertOptions
) -> Members:
    """An image and what it shows; the messages stay beside it when there was a question."""
    answers = [message for message in messages if speaker(message) in ("assistant", "gpt")]
    if len(messages) == 1:
        answers = messages
    if len(answers) != 1:
        raise ValueError(f"sample type caption is one text; this row has {len(answers)} answers: use multi_mix_qa.")
    asked = {"messages": messages} if len(messages) > 1 else {}
    body = {"captions": [{"content": text_of(answers[0])}], **asked, **_columns(left)}
    return {"json": body}, _one_image(parts, options)


def _one_image(parts: tuple[Part, ...], options: ConvertOptions) -> tuple[Part, ...]:
    """The image under its extension alone, where Energon's field map looks."""
    if [part.kind for part in parts] != ["image"]:
        kinds = ", ".join(part.kind for part in parts) or "none"
        raise ValueError(f"sample type {options.sample_type} is one image; this row has {kinds}: use multi_mix_qa.")
    suffix = parts[0].name.rpartition(".")[2]
    name = {"jpeg": "jpg", "tiff": "tif"}.get(suffix, suffix)
    return (Part(kind="image", path=parts[0].path, size=parts[0].size, name=name),)


def _part(place: int, kind: MediumKind, name: str, options: ConvertOptions) -> Part:
    path, size = resolve(kind, name, options.image_dir if kind == "image" else options.video_dir)
    return Part(kind=kind, path=path, size=size, name=part_name(place, path, suffix_of(kind, path)))


def _columns(left: dict[str, Any]) -> dict[str, Any]:
    """Other columns as they are, those whose names are taken apart."""
    apart = {name: value for name, value in left.items() if name in (*_TAKEN, "columns")}
    kept = {name: value for name, value in left.items() if name not in apart}
    return {**kept, "columns": apart} if apart else kept


def _member_size(name: str, size: int) -> int:
    long = (
        2 * _BLOCK if len(name.encode("utf-8", "surrogateescape")) > LENGTH_NAME else 0
    )  # its name is a member before
    return long + _BLOCK + -(-size // _BLOCK) * _BLOCK


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, RecursionError) as error:  # dates and bytes of Parquet
        raise ValueError(f"a column cannot be written as JSON: {error}.") from error
    except UnicodeEncodeError as error:
        raise ValueError("its text holds half of a surrogate pair, which is no character.") from error
