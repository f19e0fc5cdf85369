"""Conversations in the forms data sets have, as one: messages as OpenAI's API writes them, and tools to call."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from loongforge.data.rows import take_field, tools_of
from loongforge.data.template import Message, check_message

Form = Literal["openai", "sharegpt", "alpaca"]
AUTO = "auto"
MESSAGES = "messages"
"""The field of messages where nothing else is asked for; ShareGPT's own field is looked for beside it."""
_CONVERSATIONS = "conversations"
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A row, whatever form it came in."""

    messages: list[Message]
    """Each has a role; contents are as the row has them, text or a list of parts."""
    tools: list[Any] | None
    form: Form


def read_conversation(row: dict[str, Any], data_format: str = AUTO, messages_field: str = MESSAGES) -> Conversation:
    """The conversation of a row; `ValueError` says what is wrong with it, or which fields there are if it fits no form.

    With `auto` each row's own fields tell: `messages` or `conversations` of objects with `role` and `content` (openai)
    or `from` and `value` (sharegpt), or `instruction` and `output` (alpaca). A row that fits two forms is refused.
    """
    form = _form_of(row, messages_field) if data_format == AUTO else _known(data_format)
    if form == "alpaca":
        messages = _of_alpaca(row)
    else:
        convert = _of_sharegpt if form == "sharegpt" else _of_openai
        messages = _each(_listed(row, form, messages_field), convert)
    return Conversation(messages=_with_system(row, messages), tools=tools_of(row), form=form)


def text_of_parts(content: Any, number: int) -> Any:
    """The text of a content given in parts, one after the other; anything else as it is.

    `ValueError` for a part that is not text.
    """
    if not isinstance(content, list):
        return content
    said: list[str] = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(
                f"message {number}: a part of its content is of type {kind!r}, and the source 'chat' reads text alone."
            )
        said.append(part["text"])
    return "".join(said)


def _form_of(row: dict[str, Any], messages_field: str) -> Form:
    """The one form that the fields of a row fit."""
    field = _field(row, messages_field)
    if field is not None and row.get("instruction") is not None:
        raise ValueError(
            f"it has {field!r} and 'instruction', so it may be a list of messages or alpaca: say which with "
            "--data-format openai, sharegpt or alpaca."
        )
    if field is not None:
        first = row[field][0] if isinstance(row[field], list) and row[field] else None
        return "sharegpt" if isinstance(first, dict) and "from" in first and "role" not in first else "openai"
    if row.get("instruction") is not None:
        return "alpaca"
    wanted = repr(messages_field) if messages_field != MESSAGES else f"{MESSAGES!r}, {_CONVERSATIONS!r}"
    raise ValueError(
        f"no field {wanted} or 'instruction'; there are {', '.join(map(repr, row)) or 'none'} (--messages-field names "
        "the list of messages)."
    )


def _known(data_format: str) -> Form:
    for form in get_args(Form):
        if form == data_format:
            return form
    raise AssertionError(f"--data-format {data_format!r} is no format; the configuration has looked")


def _field(row: dict[str, Any], messages_field: str) -> str | None:
    """The field that holds a list of messages."""
    names = (MESSAGES, _CONVERSATIONS) if messages_field == MESSAGES else (messages_field,)
    return next((name for name in names if row.get(name) is not None), None)


def _listed(row: dict[str, Any], form: Form, messages_field: str) -> list[Any]:
    field = _field(row, messages_field)
    if field is None:
        usual = _CONVERSATIONS if form == "sharegpt" and messages_field == MESSAGES else messages_field
        take_field({name: value for name, value in row.items() if value is not None}, usual, "--messages-field")
        raise AssertionError("a field that is there has been found")
    listed = row[field]
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"field {field!r} must be a list of messages that is not empty.")
    return listed


def _each(listed: list[Any], convert: Callable[[dict[str, Any], int], Message]) -> list[Message]:
    messages: list[Message] = []
    for number, message in enumerate(listed):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is {type(message).__name__}, not an object with role and content.")
        messages.append(_with_arguments(check_message(convert(message, number), number), number))
    return messages


def _of_openai(message: dict[str, Any], number: int) -> Message:
    if "role" not in message and "from" in message:
        raise ValueError(f"message {number} has 'from' and no 'role': that is sharegpt (--data-format sharegpt).")
    return message


def _of_sharegpt(message: dict[str, Any], number: int) -> Message:
    if "from" not in message:
        raise ValueError(f"message {number} has no 'from'; there are {', '.join(map(repr, message)) or 'none'}.")
    speaker = str(message["from"])
    if speaker not in _SPEAKERS:
        raise ValueError(f"message {number} is from {speaker!r}; known: {', '.join(_SPEAKERS)}.")
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(message.get("value"), number)}
    return {"role": _SPEAKERS[speaker], "content": message.get("value")}


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """What a turn from `function_call` calls: one object or a list of them, or the JSON text of either."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"message {number} (function_call) is not JSON: {error}.") from error
    calls: list[dict[str, Any]] = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"message {number} (function_call) must say the name and the arguments of a function.")
        calls.append({"type": "function", "function": function})
    return calls


def _with_arguments(message: Message, number: int) -> Message:
    """Arguments of tool calls as objects, for templates write them as JSON; OpenAI's API has their text.

    Servers read the text before they render (vLLM does), so that a model is asked with what it was trained on.
    """
    if not message.get("tool_calls"):
        return message
    calls: list[Any] = []
    for call in message["tool_calls"]:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except ValueError as error:
                raise ValueError(
                    f"message {number}: the arguments of the call of {function.get('name')!r} are not JSON: {error}."
                ) from error
            call = {**call, "function": {**function, "arguments": arguments}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _of_alpaca(row: dict[str, Any]) -> list[Message]:
    """The pairs of `history`, then `instruction` with `input` on lines of its own, answered by `output`."""
    filled = {name: value for name, value in row.items() if value is not None}
    question, answer = (take_field(filled, name, "--data-format") for name in ("instruction", "output"))
    more = filled.get("input", "")
    for name, value in (("instruction", question), ("input", more), ("output", answer)):
        if not isinstance(value, str):
            raise ValueError(f"field {name!r} holds {type(value).__name__}, not text.")
    pairs = filled.get("history") or []
    turns: list[Any] = []
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise ValueError(f"entry {number} of field 'history' must be a list of a question and its answer.")
        turns += pair
    turns += [f"{question}\n{more}" if more else question, answer]
    listed = [{"role": ("user", "assistant")[place % 2], "content": said} for place, said in enumerate(turns)]
    return [check_message(message, number) for number, message in enumerate(listed)]


def _with_system(row: dict[str, Any], messages: list[Message]) -> list[Message]:
    """With the text of the column `system` ahead."""
    said = row.get("system")
    if said is None or said == "":
        return messages
    if not isinstance(said, str):
        raise ValueError(f"field 'system' holds {type(said).__name__}, not text.")
    if messages[0]["role"] == "system":
        raise ValueError("it has a field 'system' and a first message of the system: keep one of them.")
    return [check_message({"role": "system", "content": said}, 0), *messages]
