"""Features for the micro-batches of a step: made in each forward pass, or for all of them ahead of the pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from loongforge.core.errors import DataError
from loongforge.core.exchange.route import Scene
from loongforge.core.megatron.groups import World
from loongforge.core.model.contract import Visual
from loongforge.core.model.geometry import EncoderGeometry
from loongforge.core.model.omni import Features, OmniCombinationModel
from loongforge.core.step.relay import Relay

Batch = Mapping[str, Any]


class Feed(Protocol):
    """What the forward pass of the first chunk asks for features."""

    def start(self, micro_batches: Sequence[Batch]) -> None:
        """Before the first forward pass of a step."""
        ...

    def visual(self, number: int) -> Visual | None:
        """Features of a micro-batch, on ranks of the first stage."""
        ...

    def finish(self) -> None:
        """After the last backward pass."""
        ...


class NoFeed:
    """A model without an encoder, or a rank without its encoder."""

    def start(self, micro_batches: Sequence[Batch]) -> None:
        """Nothing to prepare."""

    def visual(self, number: int) -> None:
        """No features."""

    def finish(self) -> None:
        """Nothing waits."""


class Inline:
    """The first stage encodes the images of a micro-batch in its forward pass."""

    def __init__(self, omni: OmniCombinationModel) -> None:
        self._omni = omni
        self._batches: Sequence[Batch] = ()

    def start(self, micro_batches: Sequence[Batch]) -> None:
        """Remember the step's micro-batches."""
        self._batches = micro_batches

    def visual(self, number: int) -> Visual | None:
        """Encode one micro-batch. Collective over the domain."""
        batch = self._batches[number]
        features, shared = self._omni.encode([scene_of(batch, self._omni.plain.geometry)], [batch.get("pixels")])
        return features.visual(0, features.of(0), shared=shared)

    def finish(self) -> None:
        """The backward passes have done everything."""
        self._batches = ()


class Ahead:
    """All ranks encode the images of the whole step before the pipeline begins, and go backward after it has ended.

    Between the two the features wait, spread over the stages: micro-batch m on stage `m % pp`, each tensor and context
    parallel rank its own share. Later stages keep theirs in host memory, the first one with `offload` as well, so that
    its device holds those of the micro-batches in flight alone.
    """

    def __init__(self, omni: OmniCombinationModel, world: World, *, offload: bool) -> None:
        self._omni, self._world = omni, world
        self._relay = Relay(omni.ranks, world.pp.size())
        self._on_host = offload or world.pp.rank() > 0
        self._features: Features | None = None
        self._graph: GradientEdge | None = None
        self._shared = False
        self._held: list[torch.Tensor] = []
        self._grads: list[torch.Tensor | None] = []

    def start(self, micro_batches: Sequence[Batch]) -> None:
        """Encode. Collective over the domain."""
        self._relay.settle()
        scenes = [scene_of(batch, self._omni.plain.geometry) for batch in micro_batches]
        pixels = [batch.get("pixels") for batch in micro_batches]
        features, self._shared = self._omni.encode(scenes, pixels, self._relay.stages)
        # The edge alone: a tensor would keep its numbers on the device beside the copies on the host.
        self._graph = get_gradient_edge(features.rows) if features.rows.requires_grad else None
        parts = [features.of(number).detach() for number in range(len(micro_batches))]
        self._held = [_to_host(part) for part in parts] if self._on_host else parts
        self._features = features.without_rows()
        self._grads = [None] * len(micro_batches)
        self._relay.hand_out(self._held)

    def visual(self, number: int) -> Visual | None:
        """A leaf for this micro-batch whose gradient is kept for the end of the step."""
        assert self._features is not None, "start comes first"
        rows = self._held[number]
        if not self._relay.is_here(number):
            empty = torch.empty(self._features.owed[number], *rows.shape[1:], dtype=rows.dtype)
            rows = self._relay.fetch(number, empty)
        rows = rows.to(self._world.device, non_blocking=True)
        if self._graph is not None and torch.is_grad_enabled():
            rows = rows.detach().requires_grad_()
            rows.register_hook(lambda grad: self._keep(number, grad))
        return self._features.visual(number, rows, shared=self._shared)

    def _keep(self, number: int, grad: torch.Tensor) -> None:
        """The whole gradient of a leaf: its hook is called once, in front of its accumulation."""
        assert self._grads[number] is None, "one backward pass for each micro-batch"
        if not self._relay.is_here(number):
            self._relay.give_back(number, _to_host(grad))
        else:
            self._grads[number] = _to_host(grad) if self._on_host else grad

    def finish(self) -> None:
        """The tower's backward pass over the whole step. Collective over the domain."""
        graph, held, grads, relay = self._graph, self._held, self._grads, self._relay
        self._features, self._graph, self._held, self._grads = None, None, [], []
        if graph is not None:
            if self._world.pp.rank():
                grads = [relay.take_back(number, torch.empty_like(part)) for number, part in enumerate(held)]
            parts = [torch.zeros_like(part) if grad is None else grad for part, grad in zip(held, grads, strict=True)]
            torch.autograd.backward(graph, torch.cat(parts).to(self._world.device))
        relay.settle()


def scene_of(batch: Batch, geometry: EncoderGeometry) -> Scene:
    """What a route needs to know of a micro-batch.

    Raises `DataError` where its source has not kept a place for exactly every feature, or patches for every item.
    """
    rows, length = batch["tokens"].shape
    ends, pixels, positions = batch.get("cu_seqlens"), batch.get("pixels"), batch["visual_positions"].numpy()
    grids = tuple((t, h, w) for t, h, w in batch["grid"].tolist())
    counts = [("visual_positions", len(positions), "features", sum(map(geometry.features, grids)))]
    if pixels is not None:  # ranks that never encode have none
        counts.append(("pixels", len(pixels), "patches", sum(map(math.prod, grids))))
    for name, given, what, wanted in counts:
        if given != wanted:
            raise DataError(
                f"samples {batch['sample_ids'].tolist()}: {given} {name} for the {wanted} {what} of {len(grids)} "
                "items; their data source must give one for each."
            )
    return Scene(
        grids=grids,
        positions=positions,
        rows=rows,
        length=length,
        boundaries=(0, length) if ends is None else tuple(ends.tolist()),
    )


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned where there is a device to copy from."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=False)
