"""The tokenizer of the first Qwen, `qwen.tiktoken`: byte pairs by rank, made into a tokenizer of `tokenizers`.

A line is a token in base64 and its rank. The file says nothing else: how text is cut into words and which special
tokens follow the last rank stand in the code that was released with it (QwenLM/Qwen, tokenization_qwen.py).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

NAME = "qwen.tiktoken"
END = "<|endoftext|>"
SPECIAL = (END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
"""Tokens behind the last rank, in this order."""
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What byte pairs are not formed across."""


def backend(content: bytes) -> Backend:
    """The tokenizer of a file's content; `ValueError` when it is not such a file.

    Two neighbours become one where both together have a rank, the lowest rank first, as in tiktoken: every way to cut a
    token in two is a merge with the token's rank.
    """
    ranks = _ranks(content)
    letters = _letters()
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(text[left], text[right]) for left, right in _merges(ranks)]
    vocabulary = {text[token]: rank for token, rank in ranks.items()}
    made = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    made.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    made.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    made.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in SPECIAL])
    return made


def _ranks(content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"line {number} is not a token in base64 and its rank: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ranks of {len(ranks)} tokens are not 0 to {len(ranks) - 1}")
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"the byte {lacking[0]} is no token")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    for token in sorted(ranks, key=lambda one: ranks[one]):
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        yield from sorted((cut for cut in cuts if cut[0] in ranks and cut[1] in ranks), key=lambda cut: ranks[cut[0]])


def _letters() -> list[str]:
    """The character that stands for each byte in `tokenizers`: itself where it is visible, else one from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
