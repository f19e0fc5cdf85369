"""Which tokens of a conversation the assistant wrote: exactly, or an error.

A template with `{% generation %}` blocks says it itself. For any other one, the span of an assistant turn is derived:
it begins where the prompt for it ends (the conversation before the turn, rendered with the generation prompt) and ends
with its end-of-turn token. Templates that rewrite history (thinking is dropped from earlier turns) render a prefix
differently from the same messages inside the whole; then the template's own turn header and end token, learned from a
probe, locate the turn in the whole rendering. What cannot be verified is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from loongforge.data.template import ChatTemplate, Message, Span
from loongforge.data.tokenizer import HFTokenizer

_PROBES = (
    "loongforge first question",
    "loongforge first answer",
    "loongforge second question",
    "loongforge second answer",
)
_REMEDY = "Put {% generation %} blocks around what the assistant says, in a file given with --chat-template."


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised conversation."""

    tokens: np.ndarray
    """int32 `[length]`."""
    assistant: np.ndarray
    """bool `[length]`: tokens that count, those the assistant wrote, end of turn included."""
    merged: int
    """Assistant turns whose first characters share a token with the header before them; that token does not count."""


@dataclass(frozen=True, slots=True)
class _Marks:
    header: str
    """Text of the generation prompt."""
    end: str
    """Text of the end-of-turn token, with the whitespace before it if any."""


class TurnFinder:
    """Tokenises conversations of one template and tokenizer, and marks the assistant's tokens."""

    def __init__(self, tokenizer: HFTokenizer, template: ChatTemplate, *, last_only: bool = False) -> None:
        """`last_only`: of the assistant's turns only the last one counts."""
        self.tokenizer = tokenizer
        self._template = template
        self._last_only = last_only

    def encode(self, messages: list[Message], tools: list[Any] | None = None) -> Encoded:
        """Tokens and assistant mask; `ValueError` says why a mask cannot be derived, and the remedy."""
        return self.mark(*self.spans(messages, tools))

    def mark(self, text: str, spans: list[Span]) -> Encoded:
        """Tokens of a rendered text and which of them lie in the spans; `ValueError` when a token lies half in one."""
        tokens, offsets = self.tokenizer.encode_offsets(text)
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        assistant = np.zeros(len(tokens), dtype=bool)
        merged = 0
        for start, end in spans:
            if start == end:
                continue
            inside = (starts >= start) & (starts < end)
            over = inside & (ends > end)  # a special token may swallow the whitespace after it, any other token may not
            if any(tokens[position] not in self.tokenizer.special_ids for position in np.flatnonzero(over)):
                raise ValueError(
                    f"a token runs over the end of an assistant turn, {text[max(0, end - 20) : end + 20]!r}: "
                    f"the template ends a turn without a special token. {_REMEDY}"
                )
            merged += int(((starts < start) & (ends > start)).any())
            assistant |= inside
        return Encoded(np.array(tokens, dtype=np.int32), assistant, merged)

    def encode_unmasked(self, messages: list[Message], tools: list[Any] | None = None) -> Encoded:
        """Tokens, all of which count; no turn need be found."""
        tokens = np.array(self.tokenizer.encode(self.text(messages, tools)), dtype=np.int32)
        return Encoded(tokens, np.ones(len(tokens), dtype=bool), 0)

    def text(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """The rendered text."""
        return self._template.render(messages, tools).text

    def length(self, messages: list[Message], tools: list[Any] | None = None) -> int:
        """Tokens of a conversation; no turn need be found."""
        return len(self.tokenizer.encode(self.text(messages, tools)))

    def spans(self, messages: list[Message], tools: list[Any] | None = None) -> tuple[str, list[Span]]:
        """The rendered text, and the characters of every assistant turn that counts."""
        rendered = self._template.render(messages, tools)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self._template.marks_generation:
            spans = rendered.spans
            if self._last_only and len(spans) != len(turns):
                raise ValueError(
                    f"the template has {len(spans)} generation blocks for {len(turns)} assistant turns, so which of "
                    "them is the last turn is unclear: write one for each turn, or leave --history-mask-loss out."
                )
        else:
            spans = self._derive(messages, tools, rendered.text, turns)
        return rendered.text, spans[-1:] if self._last_only else spans

    def _derive(self, messages: list[Message], tools: list[Any] | None, text: str, turns: list[int]) -> list[Span]:
        spans = [self._turn(messages, tools, text, turns, place) for place in range(len(turns))]
        for (_, end), (start, _) in pairwise(spans):
            if end > start:
                raise ValueError(f"assistant turns overlap in the rendered text. {_REMEDY}")
        return spans

    def _turn(self, messages: list[Message], tools: list[Any] | None, text: str, turns: list[int], place: int) -> Span:
        """Characters of one assistant turn."""
        number = turns[place]
        before = messages[:number]
        if not before:
            raise ValueError(f"the conversation begins with an assistant turn: nothing asks for it. {_REMEDY}")
        prompt = self._template.render(before, tools, prompt=True).text
        begins = text.startswith(prompt)
        start = len(prompt) if begins else self._nth_header(text, place, len(turns))
        through = text if number == len(messages) - 1 else self._template.render(messages[: number + 1], tools).text
        ends = text.startswith(through) and len(through) > start
        end = self._after_last_special(text, start, len(through)) if ends else self._next_end(text, start)
        said = text[start:end]
        if not _holds(said, messages[number]):
            raise ValueError(f"message {number} (assistant) is not found where its turn should be. {_REMEDY}")
        if not (begins and ends) and self._marks.header in said:
            raise ValueError(f"message {number} (assistant) seems to reach into the next turn. {_REMEDY}")
        if said.startswith(self.tokenizer.special_texts) and prompt == self._template.render(before, tools).text:
            raise ValueError(
                f"the template has no generation prompt, so its turn header would be trained on. {_REMEDY}"
            )
        return start, end

    def _nth_header(self, text: str, place: int, turns: int) -> int:
        header = self._marks.header
        found = text.count(header)
        if found != turns:
            raise ValueError(
                f"the assistant header {header!r} occurs {found} times in the text of {turns} assistant turns, "
                f"so message boundaries are unclear. Take it out of the messages' text, or: {_REMEDY}"
            )
        position = -1
        for _ in range(place + 1):
            position = text.index(header, position + 1)
        return position + len(header)

    def _next_end(self, text: str, start: int) -> int:
        position = text.find(self._marks.end, start)
        if position < 0:
            raise ValueError(f"an assistant turn has no end token {self._marks.end!r} in the rendered text. {_REMEDY}")
        return position + len(self._marks.end)

    def _after_last_special(self, text: str, start: int, end: int) -> int:
        """End of the last special token in `text[start:end]` when only whitespace follows it, else `end`."""
        said = text[start:end].rstrip()
        return start + len(said) if said.endswith(self.tokenizer.special_texts) else end

    @property
    def _marks(self) -> _Marks:
        """The template's turn header and end token; `ValueError` when it shows none."""
        if isinstance(self._learnt, str):
            raise ValueError(self._learnt)
        return self._learnt

    @cached_property
    def _learnt(self) -> _Marks | str:
        """Learnt once from a conversation whose texts are known, or the reason why that cannot be."""
        roles = ("user", "assistant", "user", "assistant")
        probe: list[Message] = [{"role": role, "content": text} for role, text in zip(roles, _PROBES, strict=True)]
        try:
            bare = self._template.render(probe[:1]).text
            asking = self._template.render(probe[:1], prompt=True).text
            whole = self._template.render(probe).text
        except ValueError as error:
            return f"the template rewrites earlier turns and cannot be probed: {error} {_REMEDY}"
        header = _header(asking.removeprefix(bare), bare, whole)
        if not asking.startswith(bare) or not header.strip() or whole.count(header) != 2:
            return f"the template rewrites earlier turns and has no turn header of its own. {_REMEDY}"
        tail = whole.partition(_PROBES[1])[2].partition(_PROBES[2])[0]
        bare_tail = tail.lstrip()
        for special in self.tokenizer.special_texts:
            if bare_tail.startswith(special):
                return _Marks(header, tail[: len(tail) - len(bare_tail)] + special)
        return f"the template rewrites earlier turns and ends them without a special token. {_REMEDY}"


def _header(asks: str, bare: str, whole: str) -> str:
    """What stands before every turn of the assistant: the generation prompt, as far as an earlier turn has it too.

    With thinking off, a prompt goes on with thoughts that are empty, and templates leave those of earlier turns out.
    Empty when the prompt and an earlier turn begin differently.
    """
    closes = bare.partition(_PROBES[0])[2]
    earlier = whole.partition(_PROBES[0])[2].partition(_PROBES[1])[0].removeprefix(closes)
    shorter = min(asks, earlier, key=len)
    return shorter if asks.startswith(shorter) and earlier.startswith(shorter) else ""


def _holds(said: str, message: Message) -> bool:
    """Does the derived span hold what the message says? Thinking may have been dropped, the rest must be there."""
    content = message.get("content")
    return not isinstance(content, str) or content.rpartition("</think>")[2].strip() in said
