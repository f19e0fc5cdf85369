"""What one rank of `encoder_modes.py` measures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from image_mix import SIZES, step_of
from step_clock import Event, Recorder, cost_of_waiting, quickest_pieces

from loongforge.core.exchange.route import patch_slices
from loongforge.core.model.omni import Features, OmniCombinationModel, Tower
from loongforge.core.step.visual import Ahead, scene_of

Both = list[float]
"""CPU seconds through the route and without it, collectives, largest difference."""


@dataclass(kw_only=True)
class Rank:
    """What one rank saw; lists have an entry for each measured step."""

    loss: float = 0.0
    """Of the first step."""
    grad_norm: float = 0.0
    logs: list[list[Event]] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)
    """Seconds."""
    cpus: list[float] = field(default_factory=list)
    """CPU seconds of all threads."""
    received: list[int] = field(default_factory=list)
    """Bytes of features that this rank received in the step."""
    held: list[int] = field(default_factory=list)
    """Bytes of features on the device when the pipeline begins."""
    hosted: list[int] = field(default_factory=list)
    """The same in host memory."""
    peak: list[int] = field(default_factory=list)
    """Most bytes of features on the device during the step, those in the foundation's hands included."""
    images: list[int] = field(default_factory=list)
    feature_share: list[float] = field(default_factory=list)
    """Of the step's tokens."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """CPU seconds of all threads per step, medians."""

    routed: float
    """Route, move, gather, and back."""
    short: float
    """Putting rows that are here already into order, and back."""
    collectives: float
    """Of the first, per step."""
    difference: float
    """Largest difference between the two, of rows and of gradients."""


class Account:
    """Bytes of features on this rank: those that wait, and those in the foundation's hands until their gradient."""

    def __init__(self) -> None:
        self.received = self.waiting = self.flying = self.peak = 0

    def clear(self) -> None:
        """A new step."""
        self.received = self.waiting = self.flying = self.peak = 0

    @contextmanager
    def keep(self, feed: Any, *, offload: bool, stages: int) -> Iterator[None]:
        """Follow the features of this process, on one of `stages`. `offload`: all wait on the host."""
        encode, visual, ahead = OmniCombinationModel.encode, Features.visual, isinstance(feed, Ahead)

        def encoded(omni: Any, *args: Any) -> Any:
            features, shared = encode(omni, *args)
            self.received += features.rows.nbytes
            if ahead:
                self.waiting += features.rows.nbytes
            return features, shared

        def handed(features: Any, number: int, rows: torch.Tensor, *, shared: bool) -> Any:
            found = visual(features, number, rows, shared=shared)
            lies_here = ahead and not offload and number % stages == 0
            fresh = 0 if lies_here else rows.nbytes
            fresh += found.rows.nbytes if found.rows is not rows else 0
            self.flying += fresh
            self.peak = max(self.peak, self.flying)
            if found.rows.requires_grad:
                found.rows.register_hook(lambda grad: self._land(fresh))
            return found

        with patch.object(OmniCombinationModel, "encode", encoded), patch.object(Features, "visual", handed):
            yield

    def _land(self, size: int) -> None:
        self.flying -= size


def waiting(worker: Any) -> float:
    """Share of a core that a process uses while it waits for another."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method="env://", rank=worker.rank, world_size=worker.world_size)
    try:
        return cost_of_waiting(1.0)
    finally:
        dist.destroy_process_group()


def measure(worker: Any, config: Any, size: str, steps: int, recorder: Recorder, *, images: bool) -> Rank:
    """Train; the first step is compared and warms up, the others are measured."""
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.load import load_weights
    from loongforge.core.checkpoint.start import find_start
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import build_training

    rank, account = Rank(), Account()
    offload = config.parallel.full_hetero_dp_cpu_offload
    with part_of(config) as part:
        load_weights(part.plan, part.world, part.model, find_start(config.checkpoint))
        training = build_training(part.plan, part.world, part.model)
        on_host = offload or part.world.pp.rank() > 0
        with account.keep(training.feed, offload=offload, stages=part.world.pp.size()):
            for number in range(steps + 1):
                batches = step_of(SIZES[size], number, images=images)
                mine = batches[part.world.dp.rank() :: part.world.dp.size()]
                account.clear()
                recorder.start()
                wall, cpu = time.perf_counter(), time.process_time()
                result = train_step(part.plan, part.world, training, mine, number)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                log = recorder.stop()
                if not number:
                    rank.loss, rank.grad_norm = result.loss, result.grad_norm
                    continue
                rank.logs.append(log)
                rank.walls.append(wall)
                rank.cpus.append(cpu)
                rank.received.append(account.received)
                rank.held.append(0 if on_host else account.waiting)
                rank.hosted.append(account.waiting if on_host else 0)
                rank.peak.append(rank.held[-1] + account.peak)
                rank.images.append(sum(len(batch["grid"]) for batch in batches))
                features = sum(len(batch["visual_positions"]) for batch in batches)
                rank.feature_share.append(features / sum(batch["tokens"].numel() for batch in batches))
    return rank


def quickest(runs: Sequence[Rank]) -> Rank:
    """One rank's runs of the same steps as one. Other load makes CPU time longer, never shorter."""
    first = runs[0]
    assert all((run.loss, run.received) == (first.loss, first.received) for run in runs), "the same run again"
    return replace(
        first,
        logs=[quickest_pieces(logs) for logs in zip(*(run.logs for run in runs), strict=True)],
        walls=[min(seconds) for seconds in zip(*(run.walls for run in runs), strict=True)],
        cpus=[min(seconds) for seconds in zip(*(run.cpus for run in runs), strict=True)],
    )


class Ready(Tower):
    """In place of a tower: features that are there already."""

    def __init__(self, tower: Tower) -> None:
        torch.nn.Module.__init__(self)
        self.geometry, self.config = tower.geometry, tower.config
        self.nowhere = torch.nn.Parameter(torch.zeros(1))
        self.rows = torch.zeros(0)

    def forward(self, pixels: torch.Tensor, grid: Any) -> torch.Tensor:
        return self.rows


def measure_exchange(worker: Any, config: Any, size: str, steps: int, recorder: Recorder) -> Exchange | None:
    """Features from where they are made to where they are needed and back, without making them; None on ranks of later
    stages."""
    from loongforge.ckpt.workers import part_of

    found: list[Both] = []
    with part_of(config) as part:
        ranks = part.world.encoder
        if part.model.tower is None or ranks is None or not part.world.is_first_stage:
            return None
        ready = Ready(part.model.tower)
        width = (1 + ready.geometry.levels, part.plan.geometry.hidden_size)
        omni = OmniCombinationModel(ready, ranks, part.world.tp, split=False)
        for number in range(steps + 1):
            every = step_of(SIZES[size], number, images=True)
            mine = every[part.world.dp.rank() :: part.world.dp.size()]
            ways = [_both_ways(omni, batch, width, recorder) for batch in mine]
            found.append([*np.sum([way[:3] for way in ways], axis=0).tolist(), max(way[3] for way in ways)])
    routed, short, collectives, _ = np.median(np.array(found[1:]), axis=0).tolist()
    return Exchange(routed=routed, short=short, collectives=collectives, difference=max(one[3] for one in found))


def _both_ways(omni: OmniCombinationModel, batch: Any, width: tuple[int, int], recorder: Recorder) -> Both:
    """CPU seconds of either way for one micro-batch, collectives of the first, and how far the two are apart."""
    count = len(batch["visual_positions"])
    made, grad = torch.randn(2, count, *width, generator=torch.Generator().manual_seed(count))
    ready: Any = omni.plain
    spent, found, log = [], [], []
    for way in (_routed, _short):
        ready.rows = (made if count else torch.zeros(1, *width)).clone().requires_grad_()
        recorder.start()
        began = time.process_time()
        rows = way(omni, batch)
        torch.autograd.backward(rows, grad)
        spent.append(time.process_time() - began)
        log.append(sum(event.kind == "together" for event in recorder.stop()))
        found.append((rows.detach(), ready.rows.grad))
    (ours, ours_grad), (theirs, theirs_grad) = found
    apart = [float((left - right).abs().max()) for left, right in ((ours, theirs), (ours_grad, theirs_grad)) if count]
    return [spent[0], spent[1], log[0], max(apart, default=0.0)]


def _routed(omni: OmniCombinationModel, batch: Any) -> torch.Tensor:
    """The trainer's way."""
    features, shared = omni.encode([scene_of(batch, omni.plain.geometry)], [batch.get("pixels")])
    return features.visual(0, features.of(0), shared=shared).rows


def _short(omni: OmniCombinationModel, batch: Any) -> torch.Tensor:
    """Where one block has everything, and every rank of it needs everything: the order alone is missing."""
    scene, pixels = scene_of(batch, omni.plain.geometry), batch.get("pixels")
    if pixels is None:
        return omni.tower(*omni.plain.nothing(torch.device("cpu")))[:0]
    patches = torch.cat([pixels[part] for part in patch_slices(scene.grids)])
    row, column = np.divmod(scene.positions, scene.length)
    order = torch.from_numpy(np.argsort(column * scene.rows + row, kind="stable"))
    return omni.tower(patches, scene.grids)[order]
