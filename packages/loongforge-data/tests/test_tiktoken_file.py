"""`qwen.tiktoken` gives the tokens that tiktoken gives, computed here in the plainest way."""

from __future__ import annotations

import base64
import json
import random
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex

from loongforge.core.errors import DataError
from loongforge.data.tiktoken_file import SPECIAL, WORDS
from loongforge.data.tokenizer import HFTokenizer

TEXT = (
    "Byte pairs, ranked: the lower rank goes first, and it's 2026 already!\n\n"
    "  Indented  text with   spaces, tabs\tand aaaaaaa bananabananas, anana.\r\n"
    "你好,世界。Übergrößenträger naïve café \U0001f600\U0001f600 100000 3.1415\n"
)


def words(text: str) -> list[bytes]:
    return [word.encode() for word in regex.findall(WORDS, unicodedata.normalize("NFC", text))]


def encode(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The neighbours whose union has the lowest rank become one, the first such pair, until there are none."""
    parts = [word[at : at + 1] for at in range(len(word))]
    while pairs := [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


@pytest.fixture
def ranks() -> dict[bytes, int]:
    """Bytes, and the 100 pairs that training on the text makes: many tokens can be cut in several ways."""
    found = {bytes([byte]): byte for byte in range(256)}
    pieces = [[word[at : at + 1] for at in range(len(word))] for word in words(TEXT * 2)]
    while len(found) < 356:
        counts = Counter(pair for parts in pieces for pair in pairwise(parts) if b"".join(pair) not in found)
        (left, right), _ = counts.most_common(1)[0]
        found[left + right] = len(found)
        pieces = [_split(b"".join(parts), found) for parts in pieces]
    return found


def _split(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    tokens = {rank: token for token, rank in ranks.items()}
    return [tokens[number] for number in encode(word, ranks)]


def write(folder: Path, ranks: dict[bytes, int]) -> Path:
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def test_tokens_are_those_of_byte_pairs_by_rank(ranks: dict[bytes, int], tmp_path: Path) -> None:
    tokenizer = HFTokenizer(write(tmp_path, ranks))
    generator = random.Random(0)
    letters = sorted({*TEXT})
    noise = ["".join(generator.choices(letters, k=40)) for _ in range(200)]
    for text in [TEXT, unicodedata.normalize("NFD", TEXT), *noise]:
        found = tokenizer.encode(text)
        assert found == [number for word in words(text) for number in encode(word, ranks)]
        assert tokenizer.decode(found) == unicodedata.normalize("NFC", text)


def test_special_tokens_follow_the_last_rank(ranks: dict[bytes, int], tmp_path: Path) -> None:
    tokenizer = HFTokenizer(write(tmp_path, ranks))
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [357, ord("a"), 358]
    assert tokenizer.vocab_size == 356 + len(SPECIAL) == 356 + 208
    assert tokenizer.eos_id == tokenizer.pad_id == 356
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert HFTokenizer(tmp_path).eos_id == 358


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"YQ== 0\nno", "line 2 is not a token in base64 and its rank"),
        (b"YQ== 1\n", "the ranks of 1 tokens are not 0 to 0"),
        (b"YQ== 0\n", "the byte 0 is no token"),
    ],
)
def test_another_file_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(DataError, match=said):
        HFTokenizer(tmp_path)


def test_a_sentencepiece_model_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"tokenizer\.model and no tokenizer\.json: .*save_pretrained.*InternLM2"):
        HFTokenizer(tmp_path)
