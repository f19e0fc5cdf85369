"""Who encodes which item and where each of its features goes; the same answer on every rank of a domain."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise

import numpy as np

from loongforge.core.megatron.context_parallel import local_indices
from loongforge.core.megatron.grids import Domain, Seat
from loongforge.core.model.geometry import EncoderGeometry

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The images of one micro-batch of one foundation replica."""

    grids: tuple[Grid, ...]
    """(t, h, w) of each item in patches."""
    positions: np.ndarray
    """int64 `[features]`: place of each feature among the micro-batch's tokens `[B, S]`, flattened; ascending."""
    rows: int
    """B."""
    length: int
    """S, over all context parallel ranks."""
    boundaries: tuple[int, ...]
    """Ends of the segments of a row, from 0 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image or video of a domain."""

    replica: int
    """Number among the domain's replicas."""
    scene: int
    """Micro-batch of that replica."""
    number: int
    """Place among the scene's items."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """Every feature's way, as arrays over all features of the domain in the order of items."""

    items: tuple[Item, ...]
    block_of: np.ndarray
    """int64 `[items]`: the block that encodes each."""
    source: np.ndarray
    """int64 `[features]`: rank in the domain that hands a feature out."""
    offset: np.ndarray
    """int64 `[features]`: its row in that rank's block output."""
    target: np.ndarray
    """int64 `[features]`: rank in the domain that receives it."""
    order: np.ndarray
    """int64 `[features]`: scene and position as one number, by which a receiver sorts."""
    hidden: np.ndarray
    """int64 `[features]`: place in the receiver's hidden states `[S, B]`, flattened."""
    scene: np.ndarray
    """int64 `[features]`: micro-batch."""
    block_rows: tuple[int, ...]
    """Features that each block makes."""
    shared: bool
    """Features arrive in shares that tensor parallel ranks gather."""

    def items_of(self, block: int) -> list[Item]:
        """What a block encodes, in order."""
        return [item for item, chosen in zip(self.items, self.block_of, strict=True) if chosen == block]

    @cached_property
    def arrival(self) -> np.ndarray:
        """int64 `[features]`: all features sorted by receiver, then by micro-batch and position."""
        return np.lexsort((self.order, self.target))


def assign(costs: Sequence[float], blocks: int) -> np.ndarray:
    """Block of each item, int64: dearest first to the block with least work (Graham's longest processing time)."""
    chosen = np.zeros(len(costs), dtype=np.int64)
    loads = [(0.0, block) for block in range(blocks)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, block = heapq.heappop(loads)
        chosen[item] = block
        heapq.heappush(loads, (load + costs[item], block))
    return chosen


def route(
    scenes: Sequence[Sequence[Scene]], domain: Domain, geometry: EncoderGeometry, *, split: bool, stages: int = 1
) -> Route:
    """The way of every feature of `scenes`, a list for each replica of the domain.

    `split`: hidden states are split over tensor parallel ranks too (sequence parallelism). `stages`: micro-batch m goes
    to stage `m % stages`, to wait there; 1 brings everything to the first stage.
    """
    items = tuple(
        Item(replica=replica, scene=number, number=item)
        for replica, mine in enumerate(scenes)
        for number, scene in enumerate(mine)
        for item in range(len(scene.grids))
    )
    grids = [scenes[item.replica][item.scene].grids[item.number] for item in items]
    counts = np.array([geometry.features(grid) for grid in grids], dtype=np.int64)
    blocks = assign([geometry.cost(grid) for grid in grids], domain.blocks)
    block_rows = tuple(int(counts[blocks == block].sum()) for block in range(domain.blocks))
    source, offset = _sources(counts, blocks, block_rows, domain.tp)
    places = [
        _destinations(scene, number, domain, domain.replicas[replica], split=split, stage=number % stages)
        for replica, mine in enumerate(scenes)
        for number, scene in enumerate(mine)
    ]
    empty = np.zeros(0, dtype=np.int64)
    target, hidden, number, order = (
        np.concatenate([place[field] for place in places]) if places else empty for field in range(4)
    )
    assert len(target) == len(source), "as many positions as features: scene_of has counted them"
    return Route(
        items=items, block_of=blocks, source=source, offset=offset, target=target, hidden=hidden, scene=number,
        order=order, block_rows=block_rows, shared=not split and domain.layout.tp > 1,
    )  # fmt: skip


def shares(total: int, ranks: int) -> list[int]:
    """Boundaries of `total` rows dealt to `ranks` neighbours as evenly as can be, from 0 on."""
    each, more = divmod(total, ranks)
    return [0, *accumulate(each + (rank < more) for rank in range(ranks))]


def _sources(
    counts: np.ndarray, blocks: np.ndarray, block_rows: Sequence[int], tp: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rank that hands out each feature, and its row in the block's output."""
    source, offset = [], []
    filled = [0] * len(block_rows)
    for count, block in zip(counts.tolist(), blocks.tolist(), strict=True):
        rows = np.arange(filled[block], filled[block] + count)
        filled[block] += count
        ends = np.array(shares(block_rows[block], tp)[1:])
        source.append(block * tp + np.searchsorted(ends, rows, side="right"))
        offset.append(rows)
    empty = np.zeros(0, dtype=np.int64)
    return np.concatenate([empty, *source]), np.concatenate([empty, *offset])


def _destinations(
    scene: Scene, number: int, domain: Domain, replica: int, *, split: bool, stage: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rank, hidden place, micro-batch and sorting number of every feature of a scene, in the order of its features."""
    layout = domain.layout
    seat = {place: rank for rank, place in enumerate(domain.seats)}
    row, column = np.divmod(scene.positions, scene.length)
    target = np.zeros_like(scene.positions)
    hidden = np.zeros_like(scene.positions)
    for cp in range(layout.cp):
        local = np.full(scene.length, -1)
        mine = local_indices(scene.boundaries, cp, layout.cp).numpy()
        local[mine] = np.arange(len(mine))
        here = np.flatnonzero(local[column] >= 0)
        place = local[column[here]]
        ranks = np.array([seat[Seat(tp=tp, cp=cp, dp=replica, pp=stage)] for tp in range(layout.tp)])
        if split:
            part = len(mine) // layout.tp
            owner, place = np.divmod(place, part)
            hidden[here] = place * scene.rows + row[here]
        else:
            hidden[here] = place * scene.rows + row[here]
            ends = np.array(shares(len(here), layout.tp)[1:])
            owner = np.empty(len(here), dtype=np.int64)
            owner[np.argsort(hidden[here], kind="stable")] = np.searchsorted(ends, np.arange(len(here)), side="right")
        target[here] = ranks[owner]
    places = scene.rows * scene.length
    return target, hidden, np.full_like(target, number), number * places + hidden


def patch_slices(grids: Sequence[Grid]) -> list[slice]:
    """Where each item's patches are among those of its micro-batch."""
    ends = [0, *accumulate(t * h * w for t, h, w in grids)]
    return [slice(start, end) for start, end in pairwise(ends)]


def flattened(scenes: Sequence[Sequence[Scene]]) -> list[Scene]:
    """All scenes of a domain, replica by replica."""
    return list(chain.from_iterable(scenes))
