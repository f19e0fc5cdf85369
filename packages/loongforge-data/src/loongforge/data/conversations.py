"""Conversations, tokenised once and kept as memory-mapped arrays with their assistant mask."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loongforge.core.data.contract import SourceRequest
from loongforge.core.errors import DataError
from loongforge.data.accounts import UNTAUGHT, Accounts, Answer
from loongforge.data.formats import AUTO, MESSAGES, Conversation, read_conversation, text_of_parts
from loongforge.data.overlong import settle
from loongforge.data.progress import progress
from loongforge.data.row_files import name_of, read_rows
from loongforge.data.rows import BadRows, Place, parse_row
from loongforge.data.template import ChatTemplate, open_template
from loongforge.data.tokenise import TokenizerChoice, batched, in_order
from loongforge.data.tokenizer import HFTokenizer
from loongforge.data.turns import Encoded, TurnFinder

Line = tuple[Place, bytes]
_HINT = "--overlong drop, truncate or split goes on"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRules:
    """What decides the tokens of a conversation, apart from the conversation."""

    choice: TokenizerChoice
    template_file: str | None
    messages_field: str
    train_on_prompt: bool
    overlong: str
    """`error`, `drop`, `truncate` or `split`."""
    seq_length: int
    """Positions of a sequence; a conversation of one token more fits, since each position predicts the next token."""
    data_format: str = AUTO
    """`auto`, or the form of every row: `openai`, `sharegpt`, `alpaca`."""
    template_arguments: tuple[tuple[str, Any], ...] = ()
    """Names and values the template reads besides the conversation, in order of the names."""
    last_turn_only: bool = False
    """Of the assistant's turns only the last one counts."""

    def open(self) -> tuple[HFTokenizer, ChatTemplate]:
        """Tokenizer and template; `DataError` when there is none."""
        tokenizer = self.choice.open()
        if not isinstance(tokenizer, HFTokenizer):
            raise DataError(
                "conversations need the chat template of a Hugging Face tokenizer: --tokenizer-type HFTokenizer."
            )
        return tokenizer, open_template(tokenizer, self.template_file, dict(self.template_arguments))

    def finder(self) -> TurnFinder:
        """What tokenises conversations by these rules."""
        return TurnFinder(*self.open(), last_only=self.last_turn_only)

    def identity(self) -> str:
        """Everything that decides the tokens of a conversation, as text."""
        tokenizer, template = self.open()
        opened = (tokenizer.identity(), template.source, sorted(tokenizer.special_tokens.items()))
        return repr((*opened, replace(self, choice=_ANY, template_file=None)))


_ANY = TokenizerChoice(path=None, kind=None, vocab_size=0)
"""In place of one whose identity is told by what it opens."""


def chat_rules(request: SourceRequest) -> ChatRules:
    """The rules a request states."""
    choice = TokenizerChoice(path=request.tokenizer_path, kind=request.tokenizer_type, vocab_size=request.vocab_size)
    return ChatRules(
        choice=choice,
        template_file=request.chat_template,
        template_arguments=tuple(sorted(request.chat_template_kwargs.items())),
        messages_field=request.messages_field,
        data_format=request.data_format,
        train_on_prompt=request.train_on_prompt,
        last_turn_only=request.history_mask_loss,
        overlong=request.overlong,
        seq_length=request.seq_length,
    )


class ChatEncoder:
    """Rows with messages to tokens and masks; works in any process."""

    def __init__(self, rules: ChatRules) -> None:
        self._rules = rules
        self._finder = rules.finder()

    def __call__(self, rows: list[Line]) -> Answer[Encoded]:
        """Encode a batch; nothing is lost: each row is kept, or noted with a rule, or bad with a reason."""
        answer: Answer[Encoded] = Answer()
        for place, line in rows:
            try:
                self._row(place, line, answer)
            except ValueError as error:
                answer.bad.append((place, str(error)))
        return answer

    def _row(self, place: Place, line: bytes, answer: Answer[Encoded]) -> None:
        rules = self._rules
        row = parse_row(line)
        for media in ("images", "videos", "audios"):
            if row.get(media):
                raise ValueError(
                    f"it lists {media}, and the source 'chat' reads text alone: take them out of the data, or train a "
                    "model that sees, whose source is 'vlm'."
                )
        said = text_conversation(row, rules.data_format, rules.messages_field)
        encoder = _Row(self._finder, said, whole=rules.train_on_prompt)
        settle(answer, place, said, encoder, policy=rules.overlong, room=rules.seq_length + 1, hint=_HINT)


@dataclass(frozen=True, slots=True)
class _Row:
    """One conversation, of which some messages may be taken."""

    finder: TurnFinder
    said: Conversation
    whole: bool
    """Every token counts."""

    def encode(self, numbers: list[int]) -> Encoded:
        """Tokens and mask of the conversation made of these messages."""
        encode = self.finder.encode_unmasked if self.whole else self.finder.encode
        return encode([self.said.messages[number] for number in numbers], self.said.tools)

    def length(self, numbers: list[int]) -> int:
        """Its tokens."""
        return self.finder.length([self.said.messages[number] for number in numbers], self.said.tools)

    def size(self, one: Encoded) -> int:
        """Tokens of one that is encoded."""
        return len(one.tokens)

    def unfit(self, one: Encoded) -> str | None:
        """Nothing is learned from one in which nothing counts."""
        return None if one.assistant[1:].any() else UNTAUGHT


def text_conversation(row: dict[str, Any], data_format: str = AUTO, messages_field: str = MESSAGES) -> Conversation:
    """The conversation of a row, its contents as text; `ValueError` says what is wrong with it."""
    said = read_conversation(row, data_format, messages_field)
    texts = [text_of_parts(message.get("content"), number) for number, message in enumerate(said.messages)]
    messages = [
        message if text is message.get("content") else {**message, "content": text}
        for message, text in zip(said.messages, texts, strict=True)
    ]
    return replace(said, messages=messages)


class ConversationFile:
    """A folder of arrays: `tokens.bin` int32 and `mask.bin` bool end to end, `offsets.npy`, `facts.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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


def write_conversations(
    paths: list[Path], folder: Path, rules: ChatRules, workers: int, may_leave_out: int | None = 0
) -> None:
    """Tokenise the conversations of some files into `folder`, which appears whole or not at all.

    Bad rows are named by file and line: in a `DataError`, or in the account of the cache as far as they may be left
    out.
    """
    temporary = folder.with_name(f"{folder.name}.writing-{os.getpid()}")
    bad = BadRows(may_leave_out)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        lengths = _Lengths()
        with (
            Accounts(temporary) as accounts,
            open(temporary / "tokens.bin", "wb") as tokens,
            open(temporary / "mask.bin", "wb") as mask,
            progress(f"tokenising {folder.name.rpartition('-')[0]}", sum(map(os.path.getsize, paths))) as advance,
        ):
            lines = accounts.planned(_lines(paths, bad, advance))
            for answer in in_order(ChatEncoder, (rules,), batched(lines), workers):
                for place, reason in answer.bad:
                    bad.add(place.path, place.row, reason)
                accounts.add(answer)
                for encoded in answer.kept:
                    tokens.write(encoded.tokens.tobytes())
                    mask.write(encoded.assistant.tobytes())
                    lengths.add(encoded)
            bad.check()
            facts = accounts.summary(name_of(paths), len(lengths.lengths), bad.found)
        np.save(temporary / "offsets.npy", np.cumsum([0, *lengths.lengths]))
        (temporary / "facts.json").write_text(json.dumps({**facts, **lengths.summary()}))
        os.rename(temporary, folder)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}. Give --data-cache-path DIR.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _lines(paths: list[Path], bad: BadRows, advance: Callable[[int], None]) -> Iterator[Line]:
    for path in paths:
        for number, line in read_rows(path, bad, advance):
            yield Place(str(path), number), line


class _Lengths:
    """Adds up what was written."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._trained = self._merged = 0
        self._digest = hashlib.blake2b(digest_size=8)

    def add(self, encoded: Encoded) -> None:
        self.lengths.append(len(encoded.tokens))
        self._trained += int(encoded.assistant[1:].sum())
        self._merged += encoded.merged
        self._digest.update(encoded.tokens.tobytes() + encoded.assistant.tobytes())

    def summary(self) -> dict[str, Any]:
        return {
            "tokens": sum(self.lengths),
            "trained_tokens": self._trained,
            "merged_turn_starts": self._merged,
            "digest": self._digest.hexdigest(),
        }
