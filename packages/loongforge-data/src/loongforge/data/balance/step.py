"""What `data.balance` runs: the documents of each training step dealt by what they cost the run's model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from loongforge.core.data.balance import Deal, meeting
from loongforge.core.data.contract import Contents
from loongforge.core.plan.plan import Plan
from loongforge.data.balance.cost import AnalyticCost
from loongforge.data.balance.deal import bound
from loongforge.data.balance.plan import Sync, plan_step
from loongforge.data.balance.trade import traded
from loongforge.data.items import ItemError

_NEAR = 1 + 2.0**-10
"""A step that is so near to the bound is good enough."""
_FULL = 0.98
"""Sequences that are fuller are traded between; in others documents find places anew."""


class CostModel(Protocol):
    """What parts of a sample cost, in any one unit; never negative, and equal for equal arguments in every process."""

    def foundation(self, lengths: ArrayLike) -> np.ndarray:
        """Of documents of `lengths` `[documents]` tokens, float64; 0 for none. Padding costs as one token after the
        other, and where it is a segment of its own, as that."""
        ...

    def encoder(self, grids: ArrayLike) -> np.ndarray:
        """Of images and videos of `grids` `[items, 3]` = (t, h, w) patches, float64."""
        ...


class StepBalancer:
    """Deals a step so that its ranks finish together, by a cost model; what a balancer of one's own returns.

    Whole sequences change places; where samples are packed, their documents go to other sequences. By position where
    nothing is quicker.
    """

    def __init__(self, plan: Plan, cost: CostModel, *, of_rank: bool = False) -> None:
        """`of_rank`: costs are those of the busiest rank of a replica, else of all its ranks, which share them."""
        self._cost = cost
        self._ranks, self._parts, self._rows = plan.layout.dp, plan.num_microbatches, plan.micro_batch_size
        self._length = plan.seq_length
        self.sync: Sync = plan.config.data.balance_sync or meeting(plan)
        """Where ranks wait for each other."""
        apart = plan.encoder is not None and plan.encoder.mode == "apart"
        self._separate = self.sync == "micro_batch" or apart
        self._foundation_share, self._encoder_share = (1.0, 1.0) if of_rank else shares(plan)

    def __call__(self, contents: Contents) -> Deal:
        """Where each document goes, with `balance_before`, `balance_ratio`, `balance_bound` and `balance_moved`."""
        home = self._by_position(contents)
        work = self._work(contents)
        least, best, before = work.least, home, self._time(home, contents, work)
        time = before
        for sequences in self._others(contents, work):
            if (other := self._time(sequences, contents, work)) < time:
                best, time = sequences, other
        mine = self._parts * self._rows
        moved = contents.lengths[best // mine != home // mine].sum() / max(1, contents.lengths.sum())
        mean = float(work.costs.sum()) / self._ranks + work.floor
        return Deal(
            sequences=best,
            numbers={
                "balance_before": before / least if least else 1.0,
                "balance_ratio": time / least if least else 1.0,
                "balance_bound": least / mean if mean else 1.0,
                "balance_moved": float(moved),
            },
        )

    def _by_position(self, contents: Contents) -> np.ndarray:
        """Sequence of each document as the loader deals samples without a balancer."""
        place, row = np.divmod(contents.samples, self._rows)
        part, rank = np.divmod(place, self._ranks)
        return (rank * self._parts + part) * self._rows + row

    def _work(self, contents: Contents) -> _Work:
        seen = np.bincount(
            np.repeat(np.arange(len(contents.items)), contents.items),
            self._cost.encoder(contents.grids) if len(contents.grids) else np.empty(0),
            len(contents.items),
        )
        columns = [self._above_padding(contents.lengths), seen * self._encoder_share]
        costs = np.stack(columns, axis=1)
        if not self._separate or not contents.items.any():
            costs = costs.sum(axis=1, keepdims=True)
        floor = self._parts * self._rows * self._length * self._token() * self._foundation_share
        least = sum(bound(column, self._ranks) for column in costs.T) + floor
        return _Work(costs=costs, floor=floor, least=least)

    def _token(self) -> float:
        return float(self._cost.foundation([1])[0])

    def _above_padding(self, lengths: np.ndarray) -> np.ndarray:
        """What a document costs more than the padding that would stand in its place: a rank's shapes are fixed."""
        whole = self._cost.foundation(lengths) - lengths * self._token()
        return np.maximum(whole, 0.0) * self._foundation_share

    def _others(self, contents: Contents, work: _Work) -> Iterator[np.ndarray]:
        """Other deals that fit, as long as there is something to gain."""
        if work.enough(self._time(self._by_position(contents), contents, work)):
            return
        samples, count = contents.samples, self._ranks * self._parts * self._rows
        room = self._length - np.bincount(samples, contents.lengths, count).astype(np.int64)
        whole = np.stack([np.bincount(samples, column, count) for column in work.costs.T], axis=1)
        whole[:, 0] += self._above_padding(room)
        plan = plan_step(
            whole, np.ones(count, dtype=np.int64), ranks=self._ranks, micro_batches=self._parts, cap=self._rows,
            sync=self.sync,
        )  # fmt: skip
        order = np.argsort(plan.slots, kind="stable")
        sequence = np.empty(count, dtype=np.int64)
        sequence[order] = np.arange(count)  # every slot holds as many samples as it has rows
        dealt = sequence[samples]
        yield dealt
        if len(samples) == count or work.enough(self._time(dealt, contents, work)):
            return
        if contents.lengths.sum() <= _FULL * count * self._length:
            # A few long documents in a small step: the search may find no packing of its own.
            with suppress(ItemError):
                yield plan_step(
                    work.costs, contents.lengths, ranks=self._ranks, micro_batches=self._parts * self._rows,
                    cap=self._length, sync=self.sync,
                ).slots  # fmt: skip
        yield self._traded(dealt, contents, work)

    def _traded(self, sequences: np.ndarray, contents: Contents, work: _Work) -> np.ndarray:
        """Documents traded between full sequences of a step, or of each micro-batch where ranks meet in it."""
        costs, result = work.costs.sum(axis=1), sequences.copy()
        rank, place = np.divmod(sequences, self._parts * self._rows)
        groups = [np.arange(len(sequences))]
        if self.sync == "micro_batch":
            groups = [np.flatnonzero(place // self._rows == part) for part in range(self._parts)]
        for part, group in enumerate(groups):
            first, width = (0, self._parts * self._rows) if self.sync == "step" else (part * self._rows, self._rows)
            before = rank[group] * width + place[group] - first
            after = traded(
                costs[group], contents.lengths[group], before, ranks=self._ranks, parts=width, room=self._length
            )
            other, inside = np.divmod(after, width)
            result[group] = other * self._parts * self._rows + first + inside
        return result

    def _time(self, sequences: np.ndarray, contents: Contents, work: _Work) -> float:
        """How long the step takes, in the cost model's unit on the busiest rank."""
        count = self._ranks * self._parts * self._rows
        room = self._length - np.bincount(sequences, contents.lengths, count).astype(np.int64)
        loads = np.stack([np.bincount(sequences, column, count) for column in work.costs.T])
        loads[0] += self._above_padding(room)
        loads = loads.reshape(len(loads), self._ranks, self._parts, self._rows).sum(axis=3)
        if self.sync == "step":
            loads = loads.sum(axis=2, keepdims=True)
        return float(loads.max(axis=1).sum()) + work.floor


@dataclass(frozen=True, slots=True)
class _Work:
    costs: np.ndarray
    """float64 `[documents, components]`: on the busiest rank of a replica, foundation first, or the sum."""
    floor: float
    """What every rank computes in any case: as many positions as its sequences have."""
    least: float
    """What the step takes at least."""

    def enough(self, time: float) -> bool:
        """Whether a deal is as good as can be."""
        return time <= self.least * _NEAR


def open_analytic(plan: Plan) -> StepBalancer:
    """The balancer `analytic`."""
    return StepBalancer(plan, AnalyticCost(plan))


def shares(plan: Plan) -> tuple[float, float]:
    """What part of a replica's work the busiest of its ranks does: of the foundation, and of the encoder."""
    layout, encoder = plan.layout, plan.encoder
    largest = plan.layers_per_chunk * layout.num_chunks / plan.geometry.num_layers
    across = layout.tp * layout.cp
    if encoder is None:
        return largest / across, 0.0
    ranks = {"inline": across, "ahead": across * layout.pp, "apart": encoder.tp}
    return largest / across, 1 / ranks[encoder.mode]
