"""Several conversations into one sequence: best fit, longest first."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Packs:
    """Which items share a sequence: pack `p` holds `items[offsets[p]:offsets[p + 1]]`; every item is in one pack."""

    items: np.ndarray
    """int64 `[items]`."""
    offsets: np.ndarray
    """int64 `[packs + 1]`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        """Items of one pack, longest first."""
        return self.items[self.offsets[pack] : self.offsets[pack + 1]]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> Packs:
    """Put items of `lengths` into packs of `capacity`, each into the fullest pack that still holds it.

    The same lengths give the same packs anywhere: ties go by the order of the items.
    """
    assert len(lengths) > 0, "nothing to pack"
    assert int(lengths.min()) > 0, "lengths are positive"
    assert int(lengths.max()) <= capacity, f"a length exceeds the capacity {capacity}"
    smallest = int(lengths.min())
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # sorted keys of by_space
    chosen = np.empty(len(lengths), dtype=np.int64)
    packs = 0
    for place, length in enumerate(lengths[order].tolist()):
        at = bisect_left(spaces, length)
        if at == len(spaces):
            pack, space = packs, capacity - length
            packs += 1
        else:
            found = spaces[at]
            pack, space = by_space[found].pop(), found - length
            if not by_space[found]:
                del by_space[found], spaces[at]
        chosen[place] = pack
        if space >= smallest:
            if space not in by_space:
                by_space[space] = []
                insort(spaces, space)
            by_space[space].append(pack)
    grouped = np.argsort(chosen, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(chosen, minlength=packs))])
    return Packs(order[grouped], offsets)
