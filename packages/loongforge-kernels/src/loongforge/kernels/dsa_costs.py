"""Which of the exact routes of sparse attention is fastest for a shape: plain arithmetic over a table of speeds."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Route = Literal["causal", "masked", "gather"]
"""`causal`: every document is within top-k, so that attention is dense. `masked`: dense products under a bit mask, keys
up-projected. `gather`: the chosen rows alone, the up-projection absorbed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What a device reaches in these kernels, in TFLOP/s of the arithmetic that the result needs, and TB/s."""

    device: str
    source: str
    """`measured` with date and versions, or what it was estimated from."""
    masked_forward: float
    masked_backward: float
    gather_forward: float
    gather_backward: float
    projection: float
    """Ordinary matrix products."""
    gather_bytes: float
    """TB/s at which rows of keys are gathered, once for each 64 heads: the limit of few heads."""
    add_bytes: float
    """TB/s of fp32 additions to memory, once for each pair of query and key."""

    def __post_init__(self) -> None:
        """Raises ValueError for a rate that is none."""
        for name, value in dataclasses.asdict(self).items():
            if name not in ("device", "source") and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"{name} is {value!r}, a rate above 0 is needed")

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Speeds:
        """The table that `save` wrote."""
        return cls(**json.loads(path.read_text()))


ESTIMATED = Speeds(
    device="NVIDIA H200",
    source="estimated from a roofline, not measured",
    masked_forward=450,
    masked_backward=350,
    gather_forward=330,
    gather_backward=250,
    projection=600,
    gather_bytes=5.5,
    add_bytes=2.5,
)
"""Until a GPU has measured them: half of the matrix units' rate for dense tiles, a third for gathered ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one layer's attention works on."""

    queries: int
    """T of this rank."""
    keys: int
    """S: T times the context parallel size."""
    heads: int
    """H of this rank."""
    topk: int
    longest: int | None = None
    """Keys of the longest document; None means `keys`."""
    latent: int = 512
    rope: int = 64
    nope: int = 128
    """Width of a head's key without its rotary part, 192 for GLM-5."""
    value: int = 128
    """Width of a head's value, 256 for GLM-5."""

    @property
    def seen(self) -> float:
        """Keys in the mean row: documents are taken to be as long as the longest."""
        return ((self.longest or self.keys) + 1) / 2

    @property
    def chosen(self) -> float:
        """Keys chosen in the mean row."""
        longest = self.longest or self.keys
        if longest <= self.topk:
            return self.seen
        return self.topk * (longest - (self.topk - 1) / 2) / longest


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A route and why."""

    route: Route
    reason: str
    milliseconds: dict[str, float]
    """Forward and backward of one layer by route, without indexer and loss, which are the same in each."""

    def line(self) -> str:
        """The choice in one line."""
        times = ", ".join(f"{route} {time:.3g} ms" for route, time in self.milliseconds.items())
        return f"dsa: {self.route} ({self.reason}; {times})"


def plan(shape: Shape, speeds: Speeds = ESTIMATED) -> Plan:
    """The fastest route for a shape; `speeds` is what the device reaches."""
    times = {"masked": _masked(shape, speeds), "gather": _gather(shape, speeds)}
    longest = shape.longest or shape.keys
    if longest <= shape.topk:
        return Plan(
            route="causal",
            reason=f"documents of at most {longest} keys are within top-k {shape.topk}",
            milliseconds={"causal": times["masked"], **times},
        )
    route: Route = "masked" if times["masked"] <= times["gather"] else "gather"
    return Plan(route=route, reason=f"least time on {speeds.device}, {speeds.source}", milliseconds=times)


def _masked(shape: Shape, speeds: Speeds) -> float:
    width = shape.nope + shape.rope
    pairs = 2e-9 * shape.queries * shape.heads * shape.seen  # TFLOP per 1000 columns: the result is in milliseconds
    forward = pairs * (width + shape.value) / speeds.masked_forward
    backward = pairs * (3 * width + 2 * shape.value) / speeds.masked_backward
    return forward + backward + _projection(shape, shape.keys, speeds)


def _gather(shape: Shape, speeds: Speeds) -> float:
    width = shape.latent + shape.rope
    rows = 1e-9 * shape.queries * shape.chosen
    pairs = 2 * rows * shape.heads
    read = 2 * width * -(-shape.heads // 64) * rows / speeds.gather_bytes
    forward = max(pairs * (width + shape.latent) / speeds.gather_forward, read)
    add = 4 * width * rows / speeds.add_bytes
    backward = max(pairs * (3 * width + 2 * shape.latent) / speeds.gather_backward, read + add)
    return forward + backward + _projection(shape, shape.queries, speeds)


def _projection(shape: Shape, rows: int, speeds: Speeds) -> float:
    """Up-projection of keys and values, or of queries and outputs when it is absorbed; three products with backward."""
    return 6e-9 * rows * shape.heads * (shape.nope + shape.value) * shape.latent / speeds.projection
