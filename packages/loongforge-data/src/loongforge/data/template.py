"""A tokenizer's own chat template, rendered as `transformers` renders it, and where the assistant speaks in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from loongforge.core.errors import DataError
from loongforge.data.tokenizer import HFTokenizer

GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}
"""Names that a conversation gives to its template."""
_BEGIN, _END = "\ufdd0", "\ufdd1"
"""Unicode noncharacters, reserved for a program's own use: they mark generated text while a template renders."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which data sets keep the reasoning of a turn; templates read the first or the second."""

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text; `spans` are the characters `[start, end)` inside `{% generation %}` blocks, in order."""

    text: str
    spans: list[Span]


class ChatTemplate:
    """A Jinja chat template with the special tokens it may mention."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], origin: str, arguments: Mapping[str, Any] | None = None
    ) -> None:
        """`arguments` are names the template may read, such as `enable_thinking`; `DataError` for one it does not."""
        self.source = source
        self.origin = origin
        self.arguments = dict(arguments or {})
        self._names = {**special_tokens, **self.arguments}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
            known = meta.find_undeclared_variables(environment.parse(source))
        except TemplateSyntaxError as error:
            raise DataError(f"{origin} is not a Jinja template: {error.message} in line {error.lineno}.") from error
        for name in sorted(self.arguments.keys() - known):
            others = sorted(known - environment.globals.keys() - special_tokens.keys() - GIVEN)
            raise DataError(
                f"--chat-template-kwargs: {origin} reads no {name!r}, so it would change nothing; it reads "
                f"{', '.join(others) or 'none'}."
            )
        self.marks_generation = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None

    def render(self, messages: list[Message], tools: list[Any] | None = None, *, prompt: bool = False) -> Rendered:
        """The conversation as the model sees it; `prompt` adds the header that asks the assistant to speak.

        `ValueError` when the template refuses the conversation, with the template's own words.
        """
        try:
            text = self._template.render(
                messages=[_plain(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self._names,
            )
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return _spans(text)


def open_template(tokenizer: HFTokenizer, file: str | None, arguments: Mapping[str, Any] | None = None) -> ChatTemplate:
    """The template in `file`, or the tokenizer's own: `chat_template.jinja`, then tokenizer_config.json.

    `DataError` when there is none, or when it reads none of the names in `arguments`.
    """
    if file is not None:
        return ChatTemplate(_read(Path(file)), tokenizer.special_tokens, file, arguments)
    own = tokenizer.path / "chat_template.jinja"
    if own.is_file():
        return ChatTemplate(_read(own), tokenizer.special_tokens, str(own), arguments)
    origin = f"{tokenizer.path / 'tokenizer_config.json'} (chat_template)"
    listed = tokenizer.config.get("chat_template")
    if isinstance(listed, list):  # several templates by name
        named = {entry.get("name"): entry.get("template") for entry in listed if isinstance(entry, dict)}
        listed = named.get("default")
    if not isinstance(listed, str):
        raise DataError(
            f"the tokenizer in {tokenizer.path} has no chat template (chat_template.jinja, or chat_template in "
            f"tokenizer_config.json): give one with --chat-template FILE.jinja."
        )
    return ChatTemplate(listed, tokenizer.special_tokens, origin, arguments)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: text the assistant produces, put between marks."""

    tags = {"generation"}  # noqa: RUF012  the attribute as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _spans(marked: str) -> Rendered:
    """Take the marks out and note where they were."""
    pieces = re.split(f"([{_BEGIN}{_END}])", marked)
    spans: list[Span] = []
    text, start = "", None
    for piece in pieces:
        if piece == _BEGIN:
            if start is not None:
                raise ValueError("the chat template nests generation blocks.")
            start = len(text)
        elif piece == _END:
            if start is None:
                raise ValueError("the chat template or the conversation damages the marks of a generation block.")
            spans.append((start, len(text)))
            start = None
        else:
            text += piece
    if start is not None:
        raise ValueError("the chat template cuts a generation block off.")
    return Rendered(text, spans)


def check_message(message: Any, position: int) -> Message:
    """A message a template can render; `ValueError` says what is wrong with it."""
    if not isinstance(message, dict):
        raise ValueError(f"message {position} is {type(message).__name__}, not an object with role and content.")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"message {position} has no role (system, user, assistant or tool).")
    if message.get("content") is None and not message.get("tool_calls"):
        raise ValueError(f"message {position} ({message['role']}) has neither content nor tool_calls.")
    if any(mark in json.dumps(message, ensure_ascii=False) for mark in (_BEGIN, _END)):
        raise ValueError(f"message {position} contains U+FDD0 or U+FDD1, which are not characters of any text.")
    return message


def _plain(message: Message) -> Message:
    """Without absent values, and with the reasoning under the names templates know."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the chat template {path}: {error}") from error
