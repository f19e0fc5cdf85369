"""Conversations, tokenised once and kept as memory-mapped arrays with their assistant mask."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loongforge.core.errors import DataError
from loongforge.data.progress import progress
from loongforge.data.rows import BadRows, parse_row, read_lines, take_field, tools_of
from loongforge.data.template import ChatTemplate, Message, check_message, open_template
from loongforge.data.tokenise import Rows, TokenizerChoice, batched, in_order
from loongforge.data.tokenizer import HFTokenizer
from loongforge.data.turns import Encoded, TurnFinder

_NAMED = 5
"""Dropped rows that a report names by line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRules:
    """What decides the tokens of a conversation, apart from the conversation."""

    choice: TokenizerChoice
    template_file: str | None
    messages_field: str
    train_on_prompt: bool
    overlong: str
    """`error`, `drop` or `truncate`."""
    seq_length: int
    """Positions of a sequence; a conversation of one token more fits, since each position predicts the next token."""

    def open(self) -> tuple[HFTokenizer, ChatTemplate]:
        """Tokenizer and template; `DataError` when there is none."""
        tokenizer = self.choice.open()
        if not isinstance(tokenizer, HFTokenizer):
            raise DataError(
                "conversations need the chat template of a Hugging Face tokenizer: --tokenizer-type HFTokenizer."
            )
        return tokenizer, open_template(tokenizer, self.template_file)


@dataclass(slots=True)
class Answer:
    """What became of a batch of rows."""

    kept: list[Encoded] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    dropped: list[tuple[int, str]] = field(default_factory=list)
    truncated: int = 0
    size: int = 0
    """Bytes of the rows."""


class ChatEncoder:
    """Rows with messages to tokens and masks; works in any process."""

    def __init__(self, rules: ChatRules) -> None:
        self._rules = rules
        self._finder = TurnFinder(*rules.open())

    def __call__(self, rows: Rows) -> Answer:
        """Encode a batch; nothing is lost: each row is kept, dropped with a reason, or bad with a reason."""
        answer = Answer(size=sum(len(line) for _, line in rows))
        for number, line in rows:
            try:
                self._row(number, line, answer)
            except ValueError as error:
                answer.bad.append((number, str(error)))
        return answer

    def _row(self, number: int, line: bytes, answer: Answer) -> None:
        rules = self._rules
        row = parse_row(line)
        for media in ("images", "videos", "audios"):
            if row.get(media):
                raise ValueError(
                    f"it lists {media}, and the source 'chat' reads text alone: take them out of the data, or train a "
                    "model that sees, whose source is 'vlm'."
                )
        messages, tools = conversation_of(row, rules.messages_field)
        encoded = self._encode(messages, tools)
        if len(encoded.tokens) > rules.seq_length + 1:
            if rules.overlong == "error":
                raise ValueError(
                    f"{len(encoded.tokens)} tokens, --seq-length {rules.seq_length} holds {rules.seq_length + 1} "
                    f"(--overlong drop or truncate goes on without)."
                )
            shorter = self._truncate(messages, tools) if rules.overlong == "truncate" else None
            if shorter is None:
                answer.dropped.append((number, "too long"))
                return
            encoded = shorter
            answer.truncated += 1
        if not encoded.assistant[1:].any():
            answer.dropped.append((number, "no token to learn"))
            return
        answer.kept.append(encoded)

    def _encode(self, messages: list[Message], tools: list[Any] | None) -> Encoded:
        if self._rules.train_on_prompt:
            return self._finder.encode_unmasked(messages, tools)
        return self._finder.encode(messages, tools)

    def _truncate(self, messages: list[Message], tools: list[Any] | None) -> Encoded | None:
        """The conversation up to the last assistant turn that fits, rendered anew; None when none fits."""
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        for number in reversed(turns):
            encoded = self._encode(messages[: number + 1], tools)
            if len(encoded.tokens) <= self._rules.seq_length + 1:
                return encoded
        return None


def conversation_of(row: dict[str, Any], messages_field: str) -> tuple[list[Message], list[Any] | None]:
    """Messages and tools of a row; `ValueError` says what is wrong with it. Tools may be a list or its JSON text."""
    messages = take_field(row, messages_field, "--messages-field")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"field {messages_field!r} must be a list of messages that is not empty.")
    return [check_message(message, number) for number, message in enumerate(messages)], tools_of(row)


class ConversationFile:
    """A folder of arrays: `tokens.bin` int32 and `mask.bin` bool end to end, `offsets.npy`, `facts.json`."""

    def __init__(self, folder: Path) -> None:
        try:
            self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
            self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")
            total = int(self.offsets[-1])
            self._tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r", shape=(total,))
            self._mask = np.memmap(folder / "mask.bin", dtype=np.bool_, mode="r", shape=(total,))
        except (OSError, ValueError) as error:
            raise DataError(
                f"the cache {folder} is damaged ({error}): delete the folder, it is built again."
            ) from error

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and assistant mask of one conversation."""
        chosen = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        return self._tokens[chosen], self._mask[chosen]


def write_conversations(path: Path, folder: Path, rules: ChatRules, workers: int) -> None:
    """Tokenise the conversations of a `.jsonl` file into `folder`, which appears whole or not at all.

    `DataError` names bad rows by file and line.
    """
    temporary = folder.with_name(f"{folder.name}.writing-{os.getpid()}")
    bad, facts = BadRows(), _Facts()
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with (
            open(temporary / "tokens.bin", "wb") as tokens,
            open(temporary / "mask.bin", "wb") as mask,
            progress(f"tokenising {path.name}", os.path.getsize(path)) as advance,
        ):
            for answer in in_order(ChatEncoder, (rules,), batched(read_lines(path, bad)), workers):
                for number, reason in answer.bad:
                    bad.add(path, number, reason)
                facts.count(answer)
                for encoded in answer.kept:
                    tokens.write(encoded.tokens.tobytes())
                    mask.write(encoded.assistant.tobytes())
                advance(answer.size)
        bad.check()
        facts.require_some(path)
        np.save(temporary / "offsets.npy", np.cumsum([0, *facts.lengths]))
        (temporary / "facts.json").write_text(json.dumps(facts.summary()))
        os.rename(temporary, folder)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}. Give --data-cache-path DIR.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Facts:
    """Accounts for every row of a file."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._trained = self._merged = self._truncated = self._rows = 0
        self._dropped: Counter[str] = Counter()
        self._lines: list[str] = []
        self._digest = hashlib.blake2b(digest_size=8)

    def count(self, answer: Answer) -> None:
        self._rows += len(answer.kept) + len(answer.dropped)
        self._truncated += answer.truncated
        for encoded in answer.kept:
            self.lengths.append(len(encoded.tokens))
            self._trained += int(encoded.assistant[1:].sum())
            self._merged += encoded.merged
            self._digest.update(encoded.tokens.tobytes() + encoded.assistant.tobytes())
        for number, reason in answer.dropped:
            self._dropped[reason] += 1
            if len(self._lines) < _NAMED:
                self._lines.append(f"line {number}: {reason}")

    def require_some(self, path: Path) -> None:
        if not self._rows:
            raise DataError(f"{path} holds no conversation.")
        if not self.lengths:
            raise DataError(f"{path}: none of {self._rows} conversations can be used: {'; '.join(self._lines)}.")

    def summary(self) -> dict[str, Any]:
        return {
            "rows": self._rows,
            "conversations": len(self.lengths),
            "tokens": sum(self.lengths),
            "trained_tokens": self._trained,
            "truncated": self._truncated,
            "merged_turn_starts": self._merged,
            "dropped": dict(self._dropped),
            "dropped_lines": self._lines,
            "digest": self._digest.hexdigest(),
        }
