"""One optimizer step: which rank computes which item in which micro-batch, the same on every rank without a word."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from loongforge.data.balance.deal import bound, check_items, owners, rebalanced, with_room
from loongforge.data.items import ItemError, limit, numbers, whole_numbers
from loongforge.data.pack import Packs

Sync = Literal["step", "micro_batch"]
"""When ranks wait for each other: at the end of the step, or in each micro-batch (FSDP, expert parallelism)."""

_FINE = 2.0**-10
"""How near to the bound a plan without homes comes, where the cap lets it."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """A step's items by rank and micro-batch, and how even it is.

    Times are in the unit of the costs. Components of a cost follow each other: their times add up.
    """

    slots: np.ndarray
    """int64 `[items]`: `rank * micro_batches + micro_batch` of each item."""
    ranks: int
    micro_batches: int
    bound: float
    """What the step takes at least, however items are dealt."""
    time: float
    """What it takes: the greatest load, or with `sync="micro_batch"` the greatest of each micro-batch, added up."""
    mean: float
    """What it would take if all ranks were always busy."""
    moved: float
    """Share of the tokens that are on another rank than before; 0 without homes."""

    @property
    def ratio(self) -> float:
        """Time relative to the bound; 1 without work."""
        return self.time / self.bound if self.bound else 1.0

    def items(self, rank: int) -> list[list[int]]:
        """Numbers of the items of each micro-batch of a rank, ascending."""
        first = rank * self.micro_batches
        return [np.flatnonzero(self.slots == first + number).tolist() for number in range(self.micro_batches)]

    @cached_property
    def digest(self) -> int:
        """64 bits that are equal on all ranks exactly when their plans are: what to compare now and then."""
        shape = f"{self.ranks} {self.micro_batches} ".encode()
        content = shape + self.slots.astype("<i8").tobytes()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def plan_step(
    costs: ArrayLike,
    tokens: ArrayLike,
    *,
    ranks: int,
    micro_batches: int,
    cap: int,
    home: ArrayLike | None = None,
    sync: Sync = "step",
    aim: float = 0.01,
) -> StepPlan:
    """Deal the items of a whole step to the micro-batches of all ranks, none of which gets more than `cap` tokens.

    `costs` `[items]`, or `[items, components]` where ranks meet between the components; `tokens` `[items]`. With tokens
    of 1 and a cap of the micro-batch size every micro-batch gets as many samples, as `LoaderShape` wants it. `home`
    `[items]` is where items are when they have been read before lengths were known; then few of them move, and only
    `sync="step"` is possible. No rank needs to tell another anything: equal arguments give equal plans.
    `ItemError` as in `rebalance`, and when the items do not fit.
    """
    values, sizes = numbers(costs, "costs", dims=2), whole_numbers(tokens, "tokens")
    count, parts, most = limit(ranks, "ranks"), limit(micro_batches, "micro_batches"), limit(cap, "cap")
    homes = None if home is None else whole_numbers(home, "home")
    check_items(values, count, np.zeros_like(sizes) if homes is None else homes, sizes, most)
    if sync not in ("step", "micro_batch"):
        raise ItemError(f"sync={sync!r} must be 'step' or 'micro_batch'.")
    columns = values if values.ndim == 2 else values[:, None]
    if sync == "micro_batch" and homes is not None:
        raise ItemError("sync='micro_batch' deals items anew: leave home out, or use sync='step'.")
    owner = _dealt(columns, sizes, count, parts * most, homes, aim)
    slots = _divided(columns.sum(axis=1), sizes, owner, count, parts, most)
    slots = _dearest_first(slots, columns, count, parts)
    busy = _loads(slots, columns, count, parts)
    if sync == "step":
        busy = busy.sum(axis=2, keepdims=True)
    else:
        rows = _rows(columns, sizes, count, parts, most)
        others = _loads(rows, columns, count, parts)
        if others.max(axis=1).sum() < busy.max(axis=1).sum():
            slots, busy = rows, others
    moved = 0 if homes is None else sizes[slots // parts != homes].sum() / max(1, sizes.sum())
    return StepPlan(
        slots=slots,
        ranks=count,
        micro_batches=parts,
        bound=sum(bound(column, count) for column in columns.T),
        time=float(busy.max(axis=1).sum()),
        mean=float(columns.sum() / count),
        moved=float(moved),
    )


def _dealt(
    costs: np.ndarray, tokens: np.ndarray, groups: int, cap: int, home: np.ndarray | None, aim: float
) -> np.ndarray:
    """Group of each item, none over the cap."""
    total = costs.sum(axis=1)
    if home is not None:
        return rebalanced(total, groups, home, tokens, cap, aim)
    start = owners(costs, groups)
    if costs.shape[1] > 1:  # a search on the sum would undo what is even now
        return with_room(total, start, tokens, groups, cap)
    return rebalanced(total, groups, start, tokens, cap, _FINE)


def _rows(costs: np.ndarray, tokens: np.ndarray, ranks: int, parts: int, cap: int) -> np.ndarray:
    """Equal slots, sorted by cost: those of nearly one cost are the micro-batches that ranks compute together."""
    slot = _dealt(costs, tokens, ranks * parts, cap, None, _FINE)
    loads = np.bincount(slot, costs.sum(axis=1), ranks * parts)
    row, place = np.divmod(np.arange(ranks * parts), ranks)
    rank = np.where(row % 2, ranks - 1 - place, place)  # who got much in one row gets little in the next
    number = np.empty(ranks * parts, dtype=np.int64)
    number[np.argsort(-loads, kind="stable")] = rank * parts + row
    return number[slot]


def _dearest_first(slots: np.ndarray, costs: np.ndarray, ranks: int, parts: int) -> np.ndarray:
    """The same micro-batches of each rank in the order of their cost, so that the dear ones of all ranks meet."""
    loads = np.bincount(slots, costs.sum(axis=1), ranks * parts).reshape(ranks, parts)
    place = np.argsort(np.argsort(-loads, axis=1, kind="stable"), axis=1, kind="stable")
    return (np.arange(ranks)[:, None] * parts + place).reshape(-1)[slots]


def _loads(slots: np.ndarray, costs: np.ndarray, ranks: int, parts: int) -> np.ndarray:
    """Of each micro-batch, float64 `[components, ranks, parts]`."""
    return np.stack([np.bincount(slots, column, ranks * parts) for column in costs.T]).reshape(-1, ranks, parts)


def _divided(costs: np.ndarray, tokens: np.ndarray, owner: np.ndarray, ranks: int, parts: int, cap: int) -> np.ndarray:
    """Slot of each item: a rank's items in its micro-batches; those that find no room go to another rank."""
    slots = np.full(len(owner), -1, dtype=np.int64)
    for rank in range(ranks):
        mine = np.flatnonzero(owner == rank)
        packs = Packs.fit(tokens[mine], cap)
        for part in range(min(parts, len(packs))):
            slots[mine[packs[part]]] = rank * parts + part
    homeless = np.flatnonzero(slots < 0)
    used = np.bincount(slots[slots >= 0], tokens[slots >= 0], ranks * parts)
    loads = np.bincount(slots[slots >= 0] // parts, costs[slots >= 0], ranks)
    for item in homeless[np.argsort(-tokens[homeless], kind="stable")]:
        free = np.flatnonzero(used + tokens[item] <= cap)
        if not free.size:
            return _packed_anew(costs, tokens, ranks, parts, cap)
        slot = free[np.argmin(loads[free // parts])]
        slots[item] = slot
        used[slot] += tokens[item]
        loads[slot // parts] += costs[item]
    return slots


def _packed_anew(costs: np.ndarray, tokens: np.ndarray, ranks: int, parts: int, cap: int) -> np.ndarray:
    """Where items hardly fit: as few packs as possible, and these dealt to ranks by cost, `parts` to each at most."""
    packs = Packs.fit(tokens, cap)
    if len(packs) > ranks * parts:
        raise ItemError(
            f"{int(tokens.sum())} tokens need {len(packs)} micro-batches of cap={cap} and there are {ranks * parts}: "
            "raise the cap, or take fewer items."
        )
    owner = _pack_of(packs)
    whole = np.bincount(owner, costs, len(packs))
    rank = _dealt(whole.reshape(-1, 1), np.ones(len(packs), dtype=np.int64), ranks, parts, None, _FINE)
    order = np.argsort(rank, kind="stable")
    first = np.searchsorted(rank[order], np.arange(ranks))
    slot = np.empty(len(packs), dtype=np.int64)
    slot[order] = rank[order] * parts + np.arange(len(packs)) - first[rank[order]]
    return slot[owner]


def _pack_of(packs: Packs) -> np.ndarray:
    """Pack of each item, int64 `[items]`."""
    owner = np.empty(len(packs.items), dtype=np.int64)
    owner[packs.items] = np.repeat(np.arange(len(packs)), np.diff(packs.offsets))
    return owner
