"""A shuffle that needs no table: any position of any epoch in constant time and memory.

The order is part of what a resumed run must repeat, so it comes from arithmetic written down here, not from a random
generator whose stream may change between library versions.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8


def derive_key(*parts: object) -> int:
    """A 64-bit key from anything with a stable text form."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


class Permutation:
    """A bijection of `0 .. size-1` chosen by a key: a Feistel network, walked until it lands inside the range."""

    def __init__(self, size: int, key: int) -> None:
        assert size > 0, "a permutation of nothing"
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = [np.uint64(derive_key(key, number)) for number in range(_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Images of `positions`, int64 of the same shape."""
        values = self._rounds(positions.astype(np.uint64))
        while (outside := values >= np.uint64(self.size)).any():
            values[outside] = self._rounds(values[outside])
        return values.astype(np.int64)

    def one(self, position: int) -> int:
        """Image of one position."""
        return int(self(np.array([position]))[0])

    def _rounds(self, values: np.ndarray) -> np.ndarray:
        high, low = values >> self._low_bits, values & self._low_mask
        for number, key in enumerate(self._keys):
            if number % 2:
                low = low ^ (_mix(high, key) & self._low_mask)
            else:
                high = high ^ (_mix(low, key) & self._high_mask)
        return (high << self._low_bits) | low


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit finaliser (multiply and shift) over `values + key`; array arithmetic wraps around silently."""
    values = values + key
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
