"""Documents change places between sequences that have hardly any room: one for several of its length.

Packed sequences are full to a few tokens, so a document can only leave one when others of nearly its length come back.
Attention makes the long one dearer than those it is traded for, and that is what evens out the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from loongforge.data.items import exact

_NEAR = 9
"""A search is content within 2^-9 of the mean."""
_PARTNERS = 8
"""Ranks with least load that the fullest one tries to trade with."""
_TRADES = 128
"""Trades at most."""
_WORTH, _TRIED = 64, 8
"""A document is worth a trade when it costs at least this part of what two ranks differ by; so many are tried, the
longest first."""


def traded(
    costs: np.ndarray, lengths: np.ndarray, sequences: np.ndarray, *, ranks: int, parts: int, room: int
) -> np.ndarray:
    """`sequences` int64 `[documents]` after trades that lower the greatest load of a rank; no sequence is over `room`.

    Rank `r` has the sequences `r * parts` to `(r + 1) * parts - 1`. Equal arguments give equal answers everywhere.
    """
    values = exact(costs)
    held = [np.flatnonzero(sequences == number).tolist() for number in range(ranks * parts)]
    bins = [_Sequence.of(items, values, lengths, room) for items in held]
    loads = [sum(one.cost for one in bins[rank * parts : (rank + 1) * parts]) for rank in range(ranks)]
    goal = sum(loads) // ranks
    goal += goal >> _NEAR
    for _ in range(_TRADES):
        order = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
        fullest = order[-1]
        if loads[fullest] <= goal:
            break
        for partner in order[: min(_PARTNERS, ranks - 1)]:
            gap = loads[fullest] - loads[partner]
            mine, theirs = (range(rank * parts, (rank + 1) * parts) for rank in (fullest, partner))
            found = [(one, two, _best(bins[one], bins[two], gap)) for one in mine for two in theirs]
            trades = [(abs(2 * trade.gain - gap), one, two, trade) for one, two, trade in found if trade is not None]
            if trades:
                _, one, two, trade = min(trades, key=lambda option: option[:3])
                held[one] = [item for item in held[one] if item != trade.item] + list(trade.back)
                held[two] = [item for item in held[two] if item not in trade.back] + [trade.item]
                for number in (one, two):
                    bins[number] = _Sequence.of(held[number], values, lengths, room)
                loads[fullest] -= trade.gain
                loads[partner] += trade.gain
                break
        else:
            break
    result = np.empty_like(sequences)
    for number, items in enumerate(held):
        result[items] = number
    return result


@dataclass(frozen=True, slots=True)
class _Trade:
    item: int
    """What goes."""
    back: tuple[int, ...]
    """What comes for it."""
    gain: int


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Documents of one sequence, longest first, and which sums of lengths some of them have."""

    items: tuple[int, ...]
    costs: tuple[int, ...]
    lengths: tuple[int, ...]
    room: int
    """Positions that are free."""
    sums: tuple[int, ...]
    """Bit s of number i: some of the first i documents are s long together."""

    @classmethod
    def of(cls, items: list[int], costs: np.ndarray, lengths: np.ndarray, room: int) -> _Sequence:
        ordered = sorted(items, key=lambda item: (-lengths[item], item))
        sizes = lengths[ordered].tolist() if ordered else []
        sums = [1]
        for size in sizes:
            sums.append(sums[-1] | sums[-1] << size)
        values = costs[ordered].tolist() if ordered else []
        return cls(tuple(ordered), tuple(values), tuple(sizes), room - sum(sizes), tuple(sums))

    @property
    def cost(self) -> int:
        return sum(self.costs)

    def of_length(self, least: int, most: int) -> tuple[int, ...] | None:
        """Places of documents that are `least` to `most` long together, as many as can be among the long ones."""
        least = max(0, least)
        window = (self.sums[-1] >> least) & ((1 << (most - least + 1)) - 1)
        if not window:
            return None
        left = least + window.bit_length() - 1
        places: list[int] = []
        for place in range(len(self.items) - 1, -1, -1):
            if not self.sums[place] >> left & 1:
                places.append(place)
                left -= self.lengths[place]
        return tuple(places)


def _best(mine: _Sequence, theirs: _Sequence, gap: int) -> _Trade | None:
    """The trade that brings two ranks nearest to each other, of a document of `mine` for some of `theirs`."""
    best: _Trade | None = None
    worth = ((one, cost, length) for one, cost, length in zip(mine.items, mine.costs, mine.lengths, strict=True)
             if cost * _WORTH >= gap)  # fmt: skip
    for item, cost, length in islice(worth, _TRIED):
        places = theirs.of_length(length - theirs.room, length + mine.room)
        if places is None:
            continue
        gain = cost - sum(theirs.costs[place] for place in places)
        if 0 < gain < gap and (best is None or abs(2 * gain - gap) < abs(2 * best.gain - gap)):
            best = _Trade(item, tuple(theirs.items[place] for place in places), gain)
    return best
