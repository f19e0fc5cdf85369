"""Items to ranks, the searches of `balance`; `native/ranks.hpp` takes the same steps.

Items come sorted by cost, dearest first; an item is its place in that order, and ties go to the lower place or rank.
Costs are integers, so every order of adding them up gives the same load on every machine.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

STEPS = 64, 16
"""A search ends after this many improvements: so many, and so many for each rank."""


class Held(NamedTuple):
    """What ranks hold; int64 `[items]` each."""

    tokens: np.ndarray
    home: np.ndarray
    """Rank of each item, against which it counts as moved."""
    start: np.ndarray
    """Rank of each item from which the search goes; no rank is over the cap."""


class Standing:
    """Ranks by load, ties by number."""

    def __init__(self, loads: list[int]) -> None:
        self.loads = loads
        self._order = sorted((load, rank) for rank, load in enumerate(loads))

    def fullest(self) -> int:
        """The rank with most load, the higher number among equals."""
        return self._order[-1][1]

    def emptiest(self, most: int, but: int) -> list[int]:
        """Of the `most` emptiest ranks those that are not `but`."""
        return [rank for _, rank in self._order[:most] if rank != but]

    def shift(self, source: int, target: int, cost: int) -> None:
        """Take load from one rank to another."""
        for rank, change in ((source, -cost), (target, cost)):
            del self._order[bisect_left(self._order, (self.loads[rank], rank))]
            self.loads[rank] += change
            insort(self._order, (self.loads[rank], rank))


def assign(costs: np.ndarray, ranks: int, goal: int, look: int) -> np.ndarray:
    """Rank of each item, int64 `[items]`: the longest processing time first (Graham, 1969), then swaps.

    A swap gives an item of the fullest rank to one of the `look` emptiest, for a cheaper one or for none, so that both
    come as near to each other as they can. The search ends when no load is over `goal`, or when no swap helps.
    """
    values: list[int] = costs.tolist()
    of: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, 0, rank) for rank in range(ranks)]  # load, items, rank
    for place, cost in enumerate(values):
        load, items, rank = heap[0]
        of[rank].append(place)
        heapq.heapreplace(heap, (load + cost, items + 1, rank))
    standing = Standing([sum(values[place] for place in items) for items in of])
    for _ in range(STEPS[0] + STEPS[1] * ranks):
        full = standing.fullest()
        if standing.loads[full] <= goal:
            break
        swap = empty = None
        for empty in standing.emptiest(look, full):
            gap = standing.loads[full] - standing.loads[empty]
            if swap := closest_swap(of[full], of[empty], values, gap):
                break
        if swap is None or empty is None:
            break
        give, take, shift = swap
        _move(of, give, full, empty)
        if take is not None:
            _move(of, take, empty, full)
        standing.shift(full, empty, shift)
    return _owners(of, len(values))


def closest_swap(full: list[int], empty: list[int], costs: list[int], gap: int) -> tuple[int, int | None, int] | None:
    """What to give, what to take, and the cost that goes over, nearest to half of `gap`; None when nothing helps."""
    best, least, at = None, None, 0
    for give in full:
        while at < len(empty) and 2 * (costs[give] - costs[empty[at]]) < gap:
            at += 1
        for one in (at, at - 1) if at else (at,):
            take = empty[one] if one < len(empty) else None
            shift = costs[give] - (0 if take is None else costs[take])
            miss = abs(2 * shift - gap)
            if 0 < shift < gap and (least is None or miss < least):
                best, least = (give, take, shift), miss
    return best


def spread(costs: np.ndarray, ranks: int) -> np.ndarray:
    """Rank of each item of `costs` `[items, kinds]`: to the rank whose fullest kind stays lowest, of the kinds it has.

    Kinds are scaled so that their loads compare; ties go to the rank with fewer items.
    """
    loads = np.zeros((costs.shape[1], ranks), dtype=np.int64)
    items = np.zeros(ranks, dtype=np.int64)
    owner = np.empty(len(costs), dtype=np.int64)
    for place, cost in enumerate(costs):
        has = cost > 0
        peak = (loads[has] + cost[has, None]).max(axis=0, initial=0)
        lowest = np.flatnonzero(peak == peak.min())
        rank = lowest[np.argmin(items[lowest])]
        loads[:, rank] += cost
        items[rank] += 1
        owner[place] = rank
    return owner


@dataclass(slots=True)
class _Exchange:
    """One item against none, one or several, between the fullest rank and a partner."""

    give: int = -1
    partner: int = -1
    take: list[int] = field(default_factory=list)
    shift: int = 0
    """Cost that goes over."""
    gain: int = 0
    """Of what the fullest rank has too much."""
    moved: int = 1
    """Tokens that count as moved after it and did not before, at least 1."""

    def pays_more(self, gain: int, moved: int) -> bool:
        """Whether another one gains more for every token."""
        return gain * self.moved > self.gain * moved


def rebalance(costs: np.ndarray, held: Held, ranks: int, cap: int, aim: int, accept: int, look: int) -> np.ndarray:
    """Rank of each item, int64 `[items]`, from where the items are, with few tokens moved and no rank over `cap`.

    Until no load is over `aim`, the fullest rank exchanges with one of the `look` emptiest: an item for none or for
    one, the exchange that ends its surplus with the fewest tokens, or else the one that gains most for each. While its
    load is over `accept`, an item also goes for several: the cheapest until there is room, or the dearest.
    """
    search = _Rebalance(costs, held, ranks, cap)
    for _ in range(STEPS[0] + STEPS[1] * ranks):
        full = search.standing.fullest()
        if search.standing.loads[full] <= aim:
            break
        partners = search.standing.emptiest(look, full)
        best = search.single(full, partners, aim)
        if best.give < 0 and search.standing.loads[full] > accept:
            best = search.several(full, partners, aim)
        if best.give < 0:
            break
        search.apply(full, best)
    return _owners(search.of, len(costs))


class _Rebalance:
    def __init__(self, costs: np.ndarray, held: Held, ranks: int, cap: int) -> None:
        self.costs: list[int] = costs.tolist()
        self.tokens: list[int] = held.tokens.tolist()
        self.home: list[int] = held.home.tolist()
        self.cap = cap
        self.of: list[list[int]] = [[] for _ in range(ranks)]
        for place, rank in enumerate(held.start.tolist()):
            self.of[rank].append(place)
        self.standing = Standing([sum(self.costs[place] for place in items) for items in self.of])
        self.used = [sum(self.tokens[place] for place in items) for items in self.of]

    def moved(self, place: int, source: int, target: int) -> int:
        """Tokens that count as moved when an item goes from one rank to another; negative when it goes home."""
        if self.home[place] == source:
            return self.tokens[place]
        return -self.tokens[place] if self.home[place] == target else 0

    def single(self, full: int, partners: list[int], aim: int) -> _Exchange:
        """An item for none, or for the cheapest one that leaves the partner at `aim` or below."""
        best = _Exchange()
        loads, costs = self.standing.loads, self.costs
        need = loads[full] - aim
        for partner in partners:
            slack = aim - loads[partner]
            if slack <= 0:
                break
            theirs, at = self.of[partner], 0
            for give in self.of[full]:
                while at < len(theirs) and costs[theirs[at]] >= costs[give] - slack:
                    at += 1
                if costs[give] <= slack:
                    best = self._better(best, full, partner, give, [], need)
                if at:
                    best = self._better(best, full, partner, give, theirs[at - 1 : at], need)
        return best

    def _better(self, best: _Exchange, full: int, partner: int, give: int, take: list[int], need: int) -> _Exchange:
        shift = self.costs[give] - sum(self.costs[place] for place in take)
        more = self.tokens[give] - sum(self.tokens[place] for place in take)
        if shift <= 0 or more > self.cap - self.used[partner] or -more > self.cap - self.used[full]:
            return best
        gain = min(shift, need)
        back = sum(self.moved(place, partner, full) for place in take)
        moved = max(1, self.moved(give, full, partner) + back)
        whole, had_whole = gain == need, best.give >= 0 and best.gain == need
        if whole != had_whole:
            better = whole
        else:
            better = moved < best.moved if whole else best.pays_more(gain, moved)
        return _Exchange(give, partner, take, shift, gain, moved) if better else best

    def several(self, full: int, partners: list[int], aim: int) -> _Exchange:
        """An item for several of a partner."""
        best = _Exchange()
        for partner in partners:
            for give in self.of[full]:
                for dearest in (False, True):
                    best = self._bundle(best, full, partner, give, dearest, aim)
        return best

    def _bundle(self, best: _Exchange, full: int, partner: int, give: int, dearest: bool, aim: int) -> _Exchange:
        loads, costs, tokens = self.standing.loads, self.costs, self.tokens
        need = loads[full] - aim
        room = costs[give] - need
        lack = tokens[give] - (self.cap - self.used[partner])
        take: list[int] = []
        back = cost = 0
        for place in self.of[partner] if dearest else reversed(self.of[partner]):
            if back >= lack and not (dearest and cost < room):
                break
            if not dearest or cost + costs[place] <= room:
                take.append(place)
                back += tokens[place]
                cost += costs[place]
        if back < lack or back - tokens[give] > self.cap - self.used[full]:
            return best
        shift = costs[give] - cost
        gain = min(need, shift, loads[full] - loads[partner] - shift)
        moved = self.moved(give, full, partner) + sum(self.moved(place, partner, full) for place in take)
        better = gain > 0 and best.pays_more(gain, max(1, moved))
        return _Exchange(give, partner, take, shift, gain, max(1, moved)) if better else best

    def apply(self, full: int, one: _Exchange) -> None:
        """Do an exchange."""
        _move(self.of, one.give, full, one.partner)
        for place in one.take:
            _move(self.of, place, one.partner, full)
        more = self.tokens[one.give] - sum(self.tokens[place] for place in one.take)
        self.used[full] -= more
        self.used[one.partner] += more
        self.standing.shift(full, one.partner, one.shift)


def _move(of: list[list[int]], place: int, source: int, target: int) -> None:
    del of[source][bisect_left(of[source], place)]
    insort(of[target], place)


def _owners(of: list[list[int]], count: int) -> np.ndarray:
    owner = np.empty(count, dtype=np.int64)
    for rank, items in enumerate(of):
        owner[items] = rank
    return owner
