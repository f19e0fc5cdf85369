"""What a training would make of lengths: how full its sequences would be, and how evenly its ranks would work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loongforge.data.balance import bound, plan_step
from loongforge.data.items import ItemError
from loongforge.data.pack import Packs, pack_bound
from loongforge.data.permute import Permutation, derive_key

STEPS = 8
"""Optimizer steps that a forecast looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """Sequences of one length."""

    seq_length: int
    overlong: int
    """Rows that are longer; not in what follows."""
    unpacked: int
    """Sequences with one row in each."""
    packed: int
    bound: int
    """Sequences that any packing needs."""
    filled_unpacked: float
    filled: float
    """Share of the positions that hold a token, packed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evenness:
    """Work of the busiest rank relative to the mean rank, over `STEPS` optimizer steps."""

    dp: int
    micro_batches: int
    as_loaded: float
    """Packed sequences dealt to ranks in their shuffled order."""
    balanced: float
    """The rows of each step dealt anew by cost."""
    bound: float
    """The least possible."""


def positions_of(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """Positions that rows of `lengths` tokens take, the last token of each being a label alone; of those that fit."""
    return (lengths - 1)[lengths <= seq_length + 1]


def filling(lengths: np.ndarray, seq_length: int) -> Filling:
    """How full sequences would be; nothing is cut."""
    sizes = positions_of(lengths, seq_length)
    packed = len(Packs.fit(sizes, seq_length))
    total = int(sizes.sum())
    return Filling(
        seq_length=seq_length,
        overlong=len(lengths) - len(sizes),
        unpacked=len(sizes),
        packed=packed,
        bound=pack_bound(sizes, seq_length),
        filled_unpacked=round(total / max(1, len(sizes) * seq_length), 4),
        filled=round(total / max(1, packed * seq_length), 4),
    )


def evenness(
    sizes: np.ndarray, costs: np.ndarray, seq_length: int, micro_batches: int, ranks: Sequence[int], seed: int = 0
) -> list[Evenness]:
    """For each number of data parallel ranks, the evenness of steps of packed sequences, one in a micro-batch.

    `sizes` `[rows]` are positions, none above `seq_length`; `costs` `[rows]` in any one unit. Sequences repeat in
    further epochs, each shuffled anew, where a forecast needs more than there are. Ranks meet once a step.
    """
    packs = Packs.fit(sizes, seq_length)
    found: list[Evenness] = []
    for count in ranks:
        slots = count * micro_batches
        order = _shuffled(STEPS * slots, len(packs), seed).reshape(STEPS, slots)
        steps = [_step([packs[place] for place in places], sizes, costs, seq_length, count) for places in order]
        as_loaded, balanced, least = np.mean(steps, axis=0).round(4).tolist()
        found.append(
            Evenness(dp=count, micro_batches=micro_batches, as_loaded=as_loaded, balanced=balanced, bound=least)
        )
    return found


def _step(
    chosen: list[np.ndarray], sizes: np.ndarray, costs: np.ndarray, seq_length: int, ranks: int
) -> tuple[float, float, float]:
    """Busiest rank as loaded, balanced, and at least, relative to the mean."""
    rows, parts = np.concatenate(chosen), len(chosen) // ranks
    rank = np.repeat(np.arange(len(chosen)) // parts, [len(one) for one in chosen])
    mean = float(costs[rows].sum()) / ranks or 1.0
    loaded = float(np.bincount(rank, costs[rows], ranks).max()) / mean
    try:
        plan = plan_step(costs[rows], sizes[rows], ranks=ranks, micro_batches=parts, cap=seq_length)
    except ItemError:  # so full that dealing anew finds no room: the step stays as it is
        return loaded, loaded, bound(costs[rows], ranks) / mean
    return loaded, min(loaded, plan.time / mean), plan.bound / mean


def _shuffled(count: int, size: int, seed: int) -> np.ndarray:
    """The first `count` places of epochs of `size`, each in an order of its own."""
    epochs = [
        Permutation(size, derive_key(seed, "forecast", epoch))(np.arange(size)) for epoch in range(-(-count // size))
    ]
    return np.concatenate(epochs)[:count]
