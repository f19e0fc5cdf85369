"""Megatron's `.bin/.idx` pair: tokens end to end in one file, their lengths and documents in the other.

The index is a header, int32 lengths of the sequences, int64 byte offsets of the sequences, and int64 numbers of the
first sequence of every document with the count of sequences at the end. Files written here are, byte for byte, those of
megatron-core's builder, and its reader reads them; that package is not imported, because it takes seconds to load and
neither a data command nor a loader worker needs anything else of it.
"""

from __future__ import annotations

import hashlib
import os
import struct
from functools import cached_property
from pathlib import Path

import numpy as np

from loongforge.core.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the token type, sequences, entries of the document table."""
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Token types by megatron-core's codes; 6 and 7 are floating point and cannot hold tokens."""
_SMALL_VOCAB = 65500
"""Below this megatron-core stores tokens as uint16, from it on as int32."""
_FINGERPRINT_BYTES = 1 << 20


class IndexedFile:
    """A pair, memory-mapped, after its index was checked against itself and against the sizes of both files.

    `path` is the prefix, or one of the two files. `DataError` when one is absent, truncated or contradictory.
    """

    def __init__(self, path: str) -> None:
        self.prefix = path[:-4] if path.endswith((".bin", ".idx")) else path
        index, tokens = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        for file in (index, tokens):
            if not file.is_file():
                raise DataError(f"no {file}: --data-path takes .jsonl and .txt files and prefixes of .bin/.idx pairs.")
        with open(index, "rb") as stream:
            head = stream.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise DataError(f"{index} is not a Megatron index: its header is wrong or incomplete.")
        _, version, code, sequences, entries = _HEADER.unpack(head)
        if version != 1 or code not in _TYPES:
            raise DataError(f"{index}: version {version} with token type code {code} is not a token index this reads.")
        size, expected = os.path.getsize(index), _HEADER.size + 12 * sequences + 8 * entries
        if size not in (expected, expected + sequences):  # one more byte per sequence where modes are kept
            raise DataError(
                f"{index} is truncated or damaged: {size} bytes, {expected} expected. Write the pair again."
            )
        if sequences == 0 or entries < 2:
            raise DataError(f"{index} names no document.")
        self.documents: int = entries - 1
        self._dtype = np.dtype(_TYPES[code])
        lengths = np.memmap(index, dtype="<i4", mode="r", offset=_HEADER.size, shape=(sequences,))
        self._starts = np.memmap(index, "<i8", "r", offset=_HEADER.size + 4 * sequences, shape=(sequences,))
        self._borders = np.memmap(index, "<i8", "r", offset=_HEADER.size + 12 * sequences, shape=(entries,))
        self.tokens = int(lengths.sum(dtype=np.int64))
        self._check(lengths)
        if os.path.getsize(tokens) != self.tokens * self._dtype.itemsize:
            raise DataError(
                f"{tokens} has {os.path.getsize(tokens)} bytes, its index says {self.tokens * self._dtype.itemsize}: "
                f"one of the two is truncated or belongs to another file. Write the pair again."
            )

    def __reduce__(self) -> tuple[type[IndexedFile], tuple[str]]:
        return IndexedFile, (self.prefix,)  # a worker maps the files itself

    def spans(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last-plus-one token of documents, int64."""
        return self._tokens_before(self._borders[documents]), self._tokens_before(self._borders[documents + 1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from token `start` on, in the file's own integer type."""
        return self._stream[start : start + count]

    def digest(self) -> str:
        """Short hash of the size and of the first and last megabyte of tokens, wherever the file lies."""
        content = hashlib.blake2b(repr((self.documents, self.tokens, self._dtype.str)).encode(), digest_size=8)
        with open(f"{self.prefix}.bin", "rb") as stream:
            content.update(stream.read(_FINGERPRINT_BYTES))
            stream.seek(max(0, self.tokens * self._dtype.itemsize - _FINGERPRINT_BYTES))
            content.update(stream.read(_FINGERPRINT_BYTES))
        return content.hexdigest()

    @cached_property
    def _stream(self) -> np.ndarray:
        return np.memmap(f"{self.prefix}.bin", dtype=self._dtype, mode="r", shape=(self.tokens,))

    def _tokens_before(self, sequences: np.ndarray) -> np.ndarray:
        last = len(self._starts)
        inside = self._starts[np.minimum(sequences, last - 1)] // self._dtype.itemsize
        return np.where(sequences < last, inside, self.tokens)

    def _check(self, lengths: np.ndarray) -> None:
        steps = lengths[:-1].astype(np.int64) * self._dtype.itemsize
        sound = (
            int(lengths.min()) >= 0
            and int(self._starts[0]) == 0
            and np.array_equal(np.diff(self._starts), steps)
            and int(self._borders[0]) == 0
            and int(self._borders[-1]) == len(lengths)
            and bool((np.diff(self._borders) >= 0).all())
        )
        if not sound:
            raise DataError(f"{self.prefix}.idx is damaged: its lengths and offsets contradict each other.")


def token_type(vocab_size: int) -> np.dtype:
    """The type in which megatron-core stores tokens of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < _SMALL_VOCAB else np.int32)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write the `.idx` of documents that lie end to end, of `lengths` tokens of type `dtype`."""
    sizes = lengths.astype("<i4")
    ends = np.cumsum(sizes, dtype="<i8")
    code = next(code for code, kind in _TYPES.items() if kind == dtype.type)
    with open(path, "wb") as index:
        index.write(_HEADER.pack(_MAGIC, 1, code, len(sizes), len(sizes) + 1))
        index.write(sizes.tobytes())
        index.write(((ends - sizes) * dtype.itemsize).tobytes())
        index.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
