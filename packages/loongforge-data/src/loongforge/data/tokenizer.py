"""Text to tokens: a Hugging Face tokenizer directory, read without `transformers`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from loongforge.core.errors import DataError
from loongforge.data import tiktoken_file

SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names under which a tokenizer configuration lists its special tokens; chat templates refer to them."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def vocab_size(self) -> int:
        """Highest token id plus one, added tokens included."""
        ...

    @property
    def eos_id(self) -> int:
        """End of document."""
        ...

    @property
    def pad_id(self) -> int:
        """What fills a sequence; the end token where the tokenizer has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, no special tokens added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of several texts, as `encode` gives them; may use several threads."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special tokens kept."""
        ...

    def identity(self) -> str:
        """Short hash of everything that decides the tokens; part of cache keys and fingerprints."""
        ...


class HFTokenizer:
    """`tokenizer.json` or `qwen.tiktoken` of a directory, with the special tokens its JSON files name.

    Truncation, padding and the addition of special tokens that `tokenizer.json` may ask for are switched off: training
    data decides its own lengths, and character offsets stay those of the text.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self._file()
        self._bytes = file.read_bytes()
        try:
            self.backend = (
                tiktoken_file.backend(self._bytes)
                if file.name == tiktoken_file.NAME
                else Backend.from_buffer(self._bytes)
            )
        except Exception as error:  # the library raises bare Exception for a file it cannot use
            raise DataError(f"{file} is not a tokenizer this version of `tokenizers` can read: {error}") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.post_processor = processors.Sequence([])  # pyright: ignore[reportAttributeAccessIssue]
        end = {"eos_token": tiktoken_file.END} if file.name == tiktoken_file.NAME else {}
        self.config = {**end, **self._json("tokenizer_config.json")}
        self._add_missing_tokens()

    @cached_property
    def vocab_size(self) -> int:
        """Highest token id plus one, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def eos_id(self) -> int:
        """End of document: from tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json."""
        found = self._special_id("eos")
        if found is None:
            raise DataError(
                f"{self.path} names no end token: set eos_token in tokenizer_config.json or eos_token_id in "
                f"generation_config.json."
            )
        return found

    @cached_property
    def pad_id(self) -> int:
        """What fills a sequence; the end token where there is none."""
        found = self._special_id("pad")
        return self.eos_id if found is None else found

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Texts of the named special tokens, by role: `{"eos_token": "<|im_end|>"}`; what a chat template may use."""
        merged = {**self._json("special_tokens_map.json"), **self.config}
        texts = {role: _content(merged.get(role)) for role in SPECIAL_ROLES}
        return {role: text for role, text in texts.items() if text is not None}

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the tokens marked special, longest first."""
        texts = (token.content for token in self.backend.get_added_tokens_decoder().values() if token.special)
        return tuple(sorted(texts, key=len, reverse=True))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens marked special."""
        return frozenset(number for number, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, no special tokens added; special tokens written in the text are recognised."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of several texts, on several threads."""
        return [one.ids for one in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens, and for each the characters `[start, end)` of the text it stands for."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special tokens kept."""
        return self.backend.decode(list(tokens), skip_special_tokens=False)

    def special_id(self, text: str) -> int:
        """Id of a special token; one that is not known is added, beyond `vocab_size`, for this object alone."""
        known = self.vocab_size
        number = self.backend.token_to_id(text)
        if number is None:
            self.backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
            self.__dict__.pop("special_texts", None)
            self.__dict__.pop("special_ids", None)
            number = self.backend.token_to_id(text)
            assert number is not None, "it has just been added"
            assert number >= known, f"{text!r} took the id {number} of another token"
        return number

    def identity(self) -> str:
        """Hash of tokenizer.json, added tokens and the end token."""
        digest = hashlib.blake2b(self._bytes, digest_size=8)
        digest.update(repr((sorted(self.backend.get_added_tokens_decoder()), self._special_id("eos"))).encode())
        return digest.hexdigest()

    def _file(self) -> Path:
        """What the tokens are read from; `DataError` with the way to such a file when there is none."""
        for name in ("tokenizer.json", tiktoken_file.NAME):
            if (self.path / name).is_file():
                return self.path / name
        if (self.path / "tokenizer.model").is_file():
            raise DataError(
                f"{self.path} has a tokenizer.model and no tokenizer.json: transformers writes it once, "
                f"AutoTokenizer.from_pretrained({str(self.path)!r}).save_pretrained({str(self.path)!r}), with "
                "trust_remote_code=True where code comes with the weights (InternLM2)."
            )
        raise DataError(f"no tokenizer.json in {self.path}: give its directory with --hf-tokenizer-path.")

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{file} must hold a JSON object, found {type(content).__name__}.")
        return content

    def _special_id(self, role: str) -> int | None:
        text = self.special_tokens.get(f"{role}_token")
        if text is not None:
            number = self.backend.token_to_id(text)
            if number is None:
                raise DataError(f"{self.path}: the {role} token {text!r} is not in the vocabulary of tokenizer.json.")
            return number
        for name in ("generation_config.json", "config.json"):
            value = self._json(name).get(f"{role}_token_id")
            if isinstance(value, list) and value:
                value = value[0]
            if isinstance(value, int) and value >= 0:
                return value
        return None

    def _add_missing_tokens(self) -> None:
        """Older directories list some added tokens in tokenizer_config.json alone."""
        listed = self.config.get("added_tokens_decoder", {})
        for number, entry in sorted(listed.items(), key=lambda item: int(item[0])):
            text = _content(entry)
            if text is None or self.backend.token_to_id(text) is not None:
                continue
            flags = {name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            self.backend.add_tokens([AddedToken(text, special=bool(entry.get("special", False)), **flags)])
            if self.backend.token_to_id(text) != int(number):
                raise DataError(
                    f"{self.path}: added token {text!r} should have id {number}, tokenizer.json makes it "
                    f"{self.backend.token_to_id(text)}."
                )


class NullTokenizer:
    """Numbers separated by spaces are the tokens; the last id of the vocabulary ends a document."""

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 2:
            raise DataError(f"NullTokenizer needs a vocabulary of at least 2 tokens, got {vocab_size!r}.")
        self.vocab_size = vocab_size
        self.eos_id = vocab_size - 1
        self.pad_id = vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; `ValueError` for anything that is not a number below `vocab_size`."""
        tokens: list[int] = []
        for word in text.split():
            if not word.isdecimal() or int(word) >= self.vocab_size:
                raise ValueError(f"NullTokenizer reads numbers from 0 to {self.vocab_size - 1}, found {word[:20]!r}.")
            tokens.append(int(word))
        return tokens

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Numbers separated by spaces."""
        return " ".join(map(str, tokens))

    def identity(self) -> str:
        """The vocabulary size says everything."""
        return f"null-{self.vocab_size}"


def open_tokenizer(path: str | None, kind: str | None, vocab_size: int) -> HFTokenizer | NullTokenizer:
    """The tokenizer of a run: `kind` is `HFTokenizer`, `NullTokenizer` or None, which means HFTokenizer at `path`.

    `DataError` when there is none, it cannot be read, or it has more tokens than the model's `vocab_size`.
    """
    if kind == "NullTokenizer":
        return NullTokenizer(vocab_size)
    if kind not in (None, "HFTokenizer"):
        raise DataError(f"unknown tokenizer type {kind!r}: HFTokenizer or NullTokenizer.")
    if path is None:
        raise DataError("this data needs a tokenizer: give --hf-tokenizer-path DIR (a directory with tokenizer.json).")
    tokenizer = HFTokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer in {path} has token ids up to {tokenizer.vocab_size - 1}, the model's vocabulary ends at "
            f"{vocab_size - 1}: give the tokenizer that belongs to the model with --hf-tokenizer-path."
        )
    return tokenizer


def _content(entry: Any) -> str | None:
    """Text of a special token, which files write as a string or as an object with `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) and entry else None
