"""Documents as one endless stream of tokens, cut into windows: the order of pre-training samples.

Why not megatron-core's `GPTDataset`: it shuffles all epochs of a run together, so its order depends on the number of
samples asked for, and a resumed run with a larger --train-iters would see another past. Here the order of epoch `e` is
a function of seed and `e` alone. In each epoch every token of every document is an input exactly once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from loongforge.core.errors import DataError
from loongforge.data.indexed import IndexedFile
from loongforge.data.permute import Permutation, derive_key

_STRIDE = 64
"""Documents per entry of an epoch's table of offsets."""
_CHUNK = 1 << 16
"""Documents whose lengths are added up at a time; stays in the processor's cache."""


class Corpus:
    """Documents `first` to `last - 1` of some files, one after the other, in Megatron's format."""

    def __init__(self, files: list[IndexedFile], first: int, last: int) -> None:
        self._files = files
        self._first = first
        self.documents = last - first
        self._borders = np.cumsum([0, *(file.documents for file in files)])
        self.tokens = sum(
            int(self.lengths(np.arange(start, min(start + _CHUNK, self.documents))).sum())
            for start in range(0, self.documents, _CHUNK)
        )
        if self.tokens == 0:
            raise DataError(f"{', '.join(file.prefix for file in files)}: the chosen documents hold no token.")

    def locate(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """File, first and last-plus-one token within it of each document, int64."""
        files = np.searchsorted(self._borders, documents + self._first, side="right") - 1
        starts, ends = np.empty((2, len(documents)), dtype=np.int64)
        for file in np.unique(files):
            chosen = files == file
            starts[chosen], ends[chosen] = self._files[file].spans(
                documents[chosen] + self._first - self._borders[file]
            )
        return files, starts, ends

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each document, int64."""
        _, starts, ends = self.locate(documents)
        return ends - starts

    def read(self, file: int, start: int, count: int) -> np.ndarray:
        """Tokens of a file, in its own integer type."""
        return self._files[file].read(start, count)

    def __str__(self) -> str:
        return " ".join(file.prefix for file in self._files)


class Windows:
    """Training windows of a corpus, number 0 onwards without end.

    The epochs' tokens form one stream; window `k` of it begins at token `k * seq_length`, so consecutive windows share
    one token: the last label of one is the first input of the next. Windows are visited in a random order within the
    epoch they begin in.
    """

    def __init__(self, corpus: Corpus, *, seq_length: int, seed: int, shuffle: bool) -> None:
        self._corpus = corpus
        self._seq_length = seq_length
        self._seed = seed
        self._shuffle = shuffle
        self._epochs: dict[int, _Epoch] = {}

    def __getitem__(self, number: int) -> np.ndarray:
        """Tokens of window `number`, int64 `[seq_length + 1]`."""
        length, total = self._seq_length, self._corpus.tokens
        epoch = number * length // total
        first, after = -(-epoch * total // length), -(-(epoch + 1) * total // length)
        place = self._epoch(epoch).sample_order(after - first)(number - first)
        return self._read((first + place) * length, length + 1)

    def _read(self, start: int, count: int) -> np.ndarray:
        epoch, offset = divmod(start, self._corpus.tokens)
        pieces: list[np.ndarray] = []
        while count:
            piece = self._epoch(epoch).read(offset, count)
            pieces.append(piece)
            count -= len(piece)
            epoch, offset = epoch + 1, 0
        return np.concatenate(pieces)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            if len(self._epochs) == 2:  # a window may reach into the next epoch: two are enough
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = _Epoch(self._corpus, derive_key(self._seed, epoch) if self._shuffle else None)
        return self._epochs[epoch]


class _Epoch:
    """The order of documents in one epoch, with the token offset of every 64th."""

    def __init__(self, corpus: Corpus, key: int | None) -> None:
        self._corpus = corpus
        self._key = key
        self._order = _identity if key is None else Permutation(corpus.documents, derive_key(key, "documents"))
        self._sample_order: Callable[[int], int] | None = None
        sums: list[np.ndarray] = []
        for start in range(0, corpus.documents, _CHUNK):
            lengths = corpus.lengths(self._order(np.arange(start, min(start + _CHUNK, corpus.documents))))
            sums.append(np.add.reduceat(lengths, np.arange(0, len(lengths), _STRIDE)))
        self._offsets = np.concatenate([[0], np.cumsum(np.concatenate(sums))])

    def sample_order(self, size: int) -> Callable[[int], int]:
        """Order of the windows that begin in this epoch."""
        if self._key is None:
            return int
        if self._sample_order is None:
            self._sample_order = Permutation(size, derive_key(self._key, "samples")).one
        return self._sample_order

    def read(self, offset: int, count: int) -> np.ndarray:
        """Up to `count` tokens from token `offset` of the epoch on, int64; fewer only at its end."""
        block = int(np.searchsorted(self._offsets, offset, side="right")) - 1
        skip = offset - int(self._offsets[block])
        pieces: list[np.ndarray] = []
        while count and block < len(self._offsets) - 1:
            last = min((block + 1) * _STRIDE, self._corpus.documents)
            documents = self._order(np.arange(block * _STRIDE, last))
            for file, start, end in zip(*(column.tolist() for column in self._corpus.locate(documents)), strict=True):
                if skip >= end - start:
                    skip -= end - start
                    continue
                pieces.append(self._corpus.read(file, start + skip, min(count, end - start - skip)))
                count, skip = count - len(pieces[-1]), 0
                if not count:
                    break
            block += 1
        return np.concatenate(pieces).astype(np.int64)


def _identity(positions: np.ndarray) -> np.ndarray:
    return positions
