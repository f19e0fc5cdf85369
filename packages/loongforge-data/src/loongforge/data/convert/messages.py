"""Messages of a row: what they must be, and which media they show in which order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

MediumKind = Literal["image", "video"]
KINDS: tuple[MediumKind, ...] = ("image", "video")
Named = tuple[MediumKind, str]
"""A kind and the name under which a row knows a file of it."""


def listed(row: dict[str, Any], kind: MediumKind) -> list[str]:
    """Files a row lists under the plural or the singular field; `ValueError` for what is neither a path nor a list."""
    fields = {name: row[name] for name in (f"{kind}s", kind) if row.get(name)}
    if len(fields) == 2 and len({str(_as_list(value)) for value in fields.values()}) > 1:
        raise ValueError(f"fields '{kind}s' and '{kind}' name different files.")
    for name, value in fields.items():
        return [_path(one, name) for one in _as_list(value)]
    return []


def check_messages(messages: Any, field: str) -> list[dict[str, Any]]:
    """The messages, when they are a list of `role`/`content` or `from`/`value` objects; else `ValueError`."""
    if not isinstance(messages, list) or not messages:
        what = "is empty" if messages in ([], "", None) else f"holds {type(messages).__name__}"
        raise ValueError(f"field {field!r} {what}; a list of messages was expected.")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is {type(message).__name__}, not an object.")
        said = message.get(_said_in(message))
        if said is None and not message.get("tool_calls"):
            raise ValueError(f"message {number} says nothing: it has neither content nor value nor tool_calls.")
        if said is not None and not isinstance(said, str) and not _is_parts(said):
            raise ValueError(f"message {number}: its content is neither text nor a list of parts.")
        if "role" in message and not isinstance(message["role"], str):
            raise ValueError(f"message {number}: role {message['role']!r} is not a name.")
    return messages


def gather(
    messages: list[dict[str, Any]], lists: dict[MediumKind, list[str]]
) -> tuple[list[dict[str, Any]], list[Named]]:
    """Messages whose parts name no file any more, and all files: as listed, or as they appear where parts name some."""
    if not any(name for message in messages for _, name in _places(message) if name is not None):
        return messages, _listed(lists)
    waiting: dict[MediumKind, list[str]] = {kind: list(names) for kind, names in lists.items()}
    found: list[Named] = []
    for message in messages:
        for kind, name in _places(message):
            if name is not None:
                found.append((kind, name))
            elif waiting[kind]:
                found.append((kind, waiting[kind].pop(0)))
    found += _listed(waiting)
    return [_nameless(message) for message in messages], found


def misfits(messages: list[dict[str, Any]], media: list[Named]) -> str:
    """How the places for media differ from the media there are; empty where they agree."""
    places = [kind for message in messages for kind, _ in _places(message)]
    counts = {kind: (places.count(kind), sum(1 for one, _ in media if one == kind)) for kind in KINDS}
    return "; ".join(
        f"{asked} places for {kind}s in the messages (<{kind}>), {given} {kind}s"
        for kind, (asked, given) in counts.items()
        if asked != given
    )


def text_of(message: dict[str, Any]) -> str:
    """What a message says as one text, `<image>` where an image stands."""
    said = message.get(_said_in(message)) or ""
    if isinstance(said, str):
        return said
    return "".join(f"<{kind}>" if (kind := _kind(part)) else str(part.get("text") or "") for part in said)


def speaker(message: dict[str, Any]) -> str:
    """Its role, or whom it is from."""
    return str(message.get("role") or message.get("from") or "")


def _said_in(message: dict[str, Any]) -> str:
    return "content" if message.get("content") is not None or "value" not in message else "value"


def _listed(lists: dict[MediumKind, list[str]]) -> list[Named]:
    return [(kind, name) for kind in KINDS for name in lists[kind]]


def _is_parts(said: Any) -> bool:
    return isinstance(said, list) and all(isinstance(part, dict) for part in said)


def _places(message: dict[str, Any]) -> Iterator[tuple[MediumKind, str | None]]:
    """Kinds of the media a message shows, in order, with the file where it names one."""
    said = message.get(_said_in(message)) or ""
    if isinstance(said, str):
        marks: list[tuple[int, MediumKind]] = [(at, kind) for kind in KINDS for at in _all(said, f"<{kind}>")]
        for _, kind in sorted(marks):
            yield kind, None
        return
    for part in said:
        if (kind := _kind(part)) is not None:
            yield kind, _part_name(part, kind)


def _kind(part: dict[str, Any]) -> MediumKind | None:
    """What a part of a content list shows; None for text."""
    named = "image" if part.get("type") == "image_url" else part.get("type")
    return next((kind for kind in KINDS if kind == named), None)


def _part_name(part: dict[str, Any], kind: str) -> str | None:
    name = part.get("image_url", part.get(kind, part.get("path")))
    if isinstance(name, dict):
        name = name.get("url", name.get("path"))
    if name is not None and not isinstance(name, str):
        raise ValueError(f"a part of type {part['type']!r} names {type(name).__name__}, not a file.")
    return name or None


def _nameless(message: dict[str, Any]) -> dict[str, Any]:
    said = message.get(_said_in(message))
    if not isinstance(said, list):
        return message
    parts: list[dict[str, Any]] = []
    for part in said:
        kind = _kind(part)
        rest = {name: value for name, value in part.items() if name not in ("image_url", kind, "path")}
        parts.append({**rest, "type": kind} if kind else part)
    return {**message, _said_in(message): parts}


def _all(text: str, mark: str) -> Iterator[int]:
    at = text.find(mark)
    while at >= 0:
        yield at
        at = text.find(mark, at + len(mark))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _path(value: Any, field: str) -> str:
    if isinstance(value, dict):  # an image column of Hugging Face datasets
        if value.get("bytes") is not None:
            raise ValueError(f"field {field!r} holds the bytes of a file; write them to files and give their paths.")
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise ValueError(f"field {field!r} must be a path or a list of paths.")
    return value
