"""Items to ranks by cost: anew, or from where they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from loongforge.data.items import ItemError, descending, exact, limit, numbers, sliced, whole_numbers
from loongforge.data.solve import solver
from loongforge.data.solve.ranks import Held

_NEAR = 13
"""`assign` is content within 2^-13 of the bound, `rebalance` with what its caller says."""
_LOOK = 8
"""Emptiest ranks that the fullest one tries to exchange with when `assign` has dealt."""
_LOOK_NEAR, _LOOK_SHARE = 32, 8
"""The same in `rebalance`: so many, or an eighth of the ranks. With 32 of 1024 it ends at 1.02, with 128 at 1.01."""
_SCALE = 40
"""Bits of a component's bound when several components are compared."""


def assign(costs: ArrayLike, ranks: int) -> list[list[int]]:
    """Numbers of the items of each rank, ascending; `ranks` lists, empty ones included.

    `costs` `[items]` are in any one unit. The greatest load is within 0.02 % of `bound` where swaps between two ranks
    can bring it there. `costs` `[items, components]` are parts that ranks finish one after the other, as encoder and
    foundation where ranks wait for each other in between: each component is balanced, in units of its own bound.
    `ItemError` names an item whose cost is negative or not finite.
    """
    values, count = numbers(costs, "costs", dims=2), limit(ranks, "ranks")
    return _lists(owners(values, count), count)


def owners(costs: np.ndarray, ranks: int) -> np.ndarray:
    """As `assign`: the rank of each item, int64 `[items]`, for checked costs."""
    if costs.ndim == 2 and costs.shape[1] > 1:
        return _spread(costs, ranks)
    values = exact(costs.reshape(-1))
    order = descending(values)
    least = _bound(values[order], ranks)
    owner = np.empty(len(values), dtype=np.int64)
    owner[order] = solver().assign(values[order], ranks, least + (least >> _NEAR), _LOOK)
    return owner


def _spread(costs: np.ndarray, ranks: int) -> np.ndarray:
    """Of each component as many parts of its bound on every rank."""
    shares = np.zeros(costs.shape, dtype=np.int64)
    for component, column in enumerate(costs.T):
        values = exact(column)
        if least := _bound(-np.sort(-values), ranks):
            shares[:, component] = np.rint(values * (2.0**_SCALE / least))
    order = descending(shares.max(axis=1)) if len(shares) else np.empty(0, dtype=np.int64)
    owner = np.empty(len(shares), dtype=np.int64)
    owner[order] = solver().spread(shares[order], ranks)
    return owner


def bound(costs: ArrayLike, ranks: int) -> float:
    """What the fullest rank has at least, however items are dealt; in the unit of `costs` `[items]`.

    The mean load, the dearest item, and for every k the k + 1 cheapest of the k x ranks + 1 dearest items, of which
    some rank has k + 1. 0 without items.
    """
    values, count = numbers(costs, "costs"), limit(ranks, "ranks")
    whole = exact(values)
    unit = float(values.max()) / float(whole.max()) if values.size and whole.max() else 0.0
    return _bound(-np.sort(-whole), count) * unit


def _bound(descending_costs: np.ndarray, ranks: int) -> int:
    count = len(descending_costs)
    if count == 0:
        return 0
    sums = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(descending_costs)])
    total = int(sums[-1])
    k = np.arange(1, (count - 1) // ranks + 1)
    crowded = sums[k * ranks + 1] - sums[k * ranks - k]
    return max(-(-total // ranks), int(descending_costs[0]), int(crowded.max(initial=0)))


def rebalance(
    costs: ArrayLike, ranks: int, home: ArrayLike, tokens: ArrayLike, cap: int, *, aim: float = 0.01
) -> list[list[int]]:
    """Numbers of the items of each rank, ascending, mostly those that are there already.

    `home` `[items]` is the rank where each item is, `tokens` `[items]` what it takes of the `cap` of a rank (all
    micro-batches together), which no rank exceeds afterwards, wherever items were before. The search moves few tokens
    and stops when the greatest load is at most `1 + aim` times the bound; single exchanges that end within twice that
    are accepted too, for what is left would move much. `ItemError` names an item with a wrong cost, a home that is no
    rank or more tokens than the cap, and says when all tokens together find no room.
    """
    values, count, most = numbers(costs, "costs"), limit(ranks, "ranks"), limit(cap, "cap")
    sizes, homes = whole_numbers(tokens, "tokens"), whole_numbers(home, "home")
    check_items(values, count, homes, sizes, most)
    if not 0 <= aim < 1:
        raise ItemError(f"aim={aim!r} must be between 0 and 1, for example 0.01.")
    return _lists(rebalanced(values, count, homes, sizes, most, aim), count)


def rebalanced(costs: np.ndarray, ranks: int, home: np.ndarray, tokens: np.ndarray, cap: int, aim: float) -> np.ndarray:
    """As `rebalance`: the rank of each item, int64 `[items]`, for checked arguments."""
    values = exact(costs)
    order = descending(values)
    values = values[order]
    least = _bound(values, ranks)
    held = Held(tokens[order], home[order], with_room(values, home[order], tokens[order], ranks, cap))
    near, accepted = (least + int(least * share) for share in (aim, 2 * aim))
    owner = np.empty(len(values), dtype=np.int64)
    look = max(_LOOK_NEAR, ranks // _LOOK_SHARE)
    owner[order] = solver().rebalance(values, held, ranks, cap, near, accepted, look)
    return owner


def with_room(costs: np.ndarray, home: np.ndarray, tokens: np.ndarray, ranks: int, cap: int) -> np.ndarray:
    """`home`, or a start near it where a rank holds more than the cap: that rank gives to those with least load."""
    used, loads = np.zeros(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    np.add.at(used, home, tokens)
    np.add.at(loads, home, costs)
    start = home.copy()
    for rank in np.flatnonzero(used > cap).tolist():
        items = np.flatnonzero(start == rank)
        while used[rank] > cap:
            excess = used[rank] - cap
            sizes = tokens[items]
            # the smallest that is enough, else the largest of all
            tried = items[np.lexsort((items, np.where(sizes >= excess, sizes, -sizes), sizes < excess))]
            found = next(
                ((one, open_) for one in tried if (open_ := _open(used, loads, int(tokens[one]), cap)) >= 0), None
            )
            if found is None:
                return _packed(tokens, ranks, cap)
            item, target = found
            start[item] = target
            items = items[items != item]
            for held, amount in ((used, tokens[item]), (loads, costs[item])):
                held[rank] -= amount
                held[target] += amount
    return start


def _open(used: np.ndarray, loads: np.ndarray, tokens: int, cap: int) -> int:
    """The rank with least load that has room, -1 when none has."""
    ranks = np.flatnonzero(used + tokens <= cap)
    return int(ranks[np.argmin(loads[ranks])]) if ranks.size else -1


def _packed(tokens: np.ndarray, ranks: int, cap: int) -> np.ndarray:
    """Any start within the cap."""
    order = descending(tokens)
    places, offsets = solver().fit(tokens[order], cap, 0)
    if len(offsets) - 1 > ranks:
        raise ItemError(
            f"{int(tokens.sum())} tokens need {len(offsets) - 1} ranks of cap={cap} and there are {ranks}: "
            "raise the cap, or take fewer items."
        )
    start = np.empty(len(tokens), dtype=np.int64)
    start[order[places]] = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return start


def check_items(costs: np.ndarray, ranks: int, home: np.ndarray, tokens: np.ndarray, cap: int) -> None:
    if not len(costs) == len(home) == len(tokens):
        raise ItemError(f"{len(costs)} costs, {len(home)} homes and {len(tokens)} tokens: give one of each per item.")
    if (strangers := np.flatnonzero(home >= ranks)).size:
        item = strangers[0]
        raise ItemError(f"home: item {item} has {home[item]}, which is none of the {ranks} ranks, 0 to {ranks - 1}.")
    if (large := np.flatnonzero(tokens > cap)).size:
        item = large[0]
        raise ItemError(
            f"tokens: item {item} has {tokens[item]}, more than cap={cap}: shorten or drop it, or raise the cap."
        )


def _lists(owner: np.ndarray, ranks: int) -> list[list[int]]:
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.bincount(owner, minlength=ranks))])
    return sliced(np.argsort(owner.astype(np.uint16) if ranks <= 2**16 else owner, kind="stable"), ends)
