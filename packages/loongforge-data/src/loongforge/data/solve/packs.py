"""Best fit decreasing, the search of `pack`; `native/packs.hpp` takes the same steps."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

import numpy as np


class Stacks:
    """Items by an amount; the one put last among equal amounts goes first."""

    def __init__(self) -> None:
        self._items: dict[int, list[int]] = {}
        self._amounts: list[int] = []  # sorted keys of _items

    def __bool__(self) -> bool:
        return bool(self._amounts)

    def put(self, amount: int, item: int) -> None:
        """Add an item."""
        if amount not in self._items:
            self._items[amount] = []
            insort(self._amounts, amount)
        self._items[amount].append(item)

    def at_least(self, amount: int) -> int:
        """The least amount that is at least `amount`, -1 without one."""
        at = bisect_left(self._amounts, amount)
        return self._amounts[at] if at < len(self._amounts) else -1

    def at_most(self, amount: int) -> int:
        """The greatest amount that is at most `amount`, -1 without one."""
        at = bisect_right(self._amounts, amount)
        return self._amounts[at - 1] if at else -1

    def take(self, amount: int) -> int:
        """Remove and return an item of this amount."""
        items = self._items[amount]
        item = items.pop()
        if not items:
            del self._items[amount], self._amounts[bisect_left(self._amounts, amount)]
        return item


def fit(lengths: np.ndarray, capacity: int, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Each length into the fullest pack that still holds it, the one filled last among equals.

    Every `every`-th item is spared for the ends of packs (0 spares none): where an item would leave a rest into which
    none fits, the longest spared one that fits takes its place, if it is longer. Those left over come last.

    Returns `places`, int64 `[items]`, and `offsets`, int64 `[packs + 1]`: pack `p` holds
    `places[offsets[p]:offsets[p + 1]]`, longest first.
    """
    values: list[int] = lengths.tolist()
    order: list[int] = []
    spare, spaces = Stacks(), Stacks()
    for place, length in enumerate(values):
        if every and place % every == every - 1:
            spare.put(length, place)
        else:
            order.append(place)
    smallest = values[-1] if values else 0
    chosen = np.empty(len(values), dtype=np.int64)
    packs = step = 0
    while step < len(order) or spare:
        if step == len(order):
            place = spare.take(spare.at_most(capacity))
            space = spaces.at_least(values[place])
        else:
            place = order[step]
            space = spaces.at_least(values[place])
            better = spare.at_most(space) if 0 < space - values[place] < smallest else -1
            if better > values[place]:
                place = spare.take(better)
            else:
                step += 1
        if space < 0:
            pack, space = packs, capacity
            packs += 1
        else:
            pack = spaces.take(space)
        chosen[place] = pack
        if space - values[place] >= smallest:
            spaces.put(space - values[place], pack)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.bincount(chosen, minlength=packs))])
    return np.argsort(chosen, kind="stable"), offsets.astype(np.int64)
