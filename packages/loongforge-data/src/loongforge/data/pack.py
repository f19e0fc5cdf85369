"""Items into packs of one capacity: all at once, longest first into the best fit, or as they come, through a window."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from loongforge.data.items import ItemError, descending, limit, sliced, whole_numbers
from loongforge.data.solve import solver

_SPARED = 32
"""Every 32nd item may end a pack: on captions, 60 items a pack, this halves what best fit decreasing loses."""
_NEAR = 13
"""Within 2^-13 of the fewest there is no second try."""


@dataclass(frozen=True, slots=True)
class Packs:
    """Which items share a sequence: pack `p` holds `items[offsets[p]:offsets[p + 1]]`; every item is in one pack."""

    items: np.ndarray
    """int64 `[items]`."""
    offsets: np.ndarray
    """int64 `[packs + 1]`."""

    @classmethod
    def fit(cls, lengths: ArrayLike, capacity: int) -> Packs:
        """As `pack`, in arrays."""
        values, room = _checked(lengths, capacity)
        order = descending(values)
        places, offsets = solver().fit(values[order], room, 0)
        fewest = -(-int(values.sum()) // room)
        if len(offsets) - 1 > fewest + (fewest >> _NEAR):
            others, ends = solver().fit(values[order], room, _SPARED)
            if len(ends) < len(offsets):
                places, offsets = others, ends
        return cls(order[places], offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        """Items of one pack, longest first."""
        return self.items[self.offsets[pack] : self.offsets[pack + 1]]


def pack(lengths: ArrayLike, capacity: int) -> list[list[int]]:
    """Numbers of the items of each pack, longest first; no pack is longer than `capacity`.

    Best fit decreasing (Johnson et al., 1974): longest first, each item into the fullest pack that still holds it, at
    most 11/9 of the fewest possible packs and a few. Where that is 0.01 % more than the lengths add up to, a second
    try keeps some items back to fill what others leave, and the better one counts. Equal lengths go by number, so the
    same lengths give the same packs on every machine. Lengths are whole numbers, 0 or more. `ItemError` names an item
    that is none or is longer than the capacity.
    """
    packs = Packs.fit(lengths, capacity)
    return sliced(packs.items, packs.offsets)


def pack_bound(lengths: ArrayLike, capacity: int) -> int:
    """Packs that any packing needs at least: bound L2 of Martello and Toth (1990), never below the sum's.

    For a threshold k, items longer than `capacity - k` are alone; those longer than half are in different packs; what
    is left of these may take the items from k to one half.
    """
    values, room = _checked(lengths, capacity)
    if values.size == 0:
        return 0
    ascending = np.sort(values)
    sums = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(ascending)])
    half = int(np.searchsorted(ascending, room // 2, side="right"))
    thresholds = np.unique(np.concatenate([np.zeros(1, dtype=np.int64), ascending[:half]]))
    first = np.searchsorted(ascending, thresholds)
    alone = np.searchsorted(ascending, room - thresholds, side="right")
    spare = (alone - half) * room - (sums[alone] - sums[half])
    more = np.maximum(0, -(-(sums[half] - sums[first] - spare) // room))
    fullest = len(ascending) - half + more
    return int(max(fullest.max(), -(-sums[-1] // room), 1))


def pack_stream(lengths: Iterable[int], capacity: int, window: int = 256) -> Iterator[list[int]]:
    """Packs of items that come one after the other, while at most `window` of them are held back.

    A pack begins with the item that has waited longest, and takes the longest of the window that fits until none does.
    So an item waits for at most `window` packs. Items are numbered as they come; in a pack they are in the order they
    were taken. The same lengths give the same packs. `ItemError` as in `pack`.
    """
    room, most = limit(capacity, "capacity"), limit(window, "window")
    source = enumerate(lengths)
    held: list[tuple[int, int]] = []  # length and number, ascending
    waiting: deque[tuple[int, int]] = deque()  # in the order they came; some are in a pack by now
    while True:
        while len(held) < most and (one := next(source, None)) is not None:
            item = _one(one[1], one[0], room), one[0]
            insort(held, item)
            waiting.append(item)
        while waiting and bisect_left(held, waiting[0]) == bisect_right(held, waiting[0]):
            waiting.popleft()
        if not waiting:
            return
        at, taken, space = bisect_left(held, waiting[0]), [], room
        while at >= 0:
            length, number = held.pop(at)
            taken.append(number)
            space -= length
            at = bisect_right(held, space, key=_length) - 1
        yield taken


def _length(item: tuple[int, int]) -> int:
    return item[0]


def _checked(lengths: ArrayLike, capacity: int) -> tuple[np.ndarray, int]:
    values, room = whole_numbers(lengths, "lengths"), limit(capacity, "capacity")
    if values.size and int(values.max()) > room:
        number = int(np.argmax(values > room))
        raise ItemError(_too_long(number, values[number].item(), room))
    return values, room


def _one(length: Any, number: int, room: int) -> int:
    if not (isinstance(length, int | np.integer) and length >= 0):
        raise ItemError(f"lengths: item {number} has {length!r}: it must be a whole number, 0 or more.")
    if length > room:
        raise ItemError(_too_long(number, int(length), room))
    return int(length)


def _too_long(number: int, length: int, room: int) -> str:
    return f"lengths: item {number} has {length}, more than the capacity {room}: shorten or drop it, or raise that."
