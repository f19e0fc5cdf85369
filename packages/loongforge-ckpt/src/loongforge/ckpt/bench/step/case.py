"""What is measured, and what a side answers: plain data that passes between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from loongforge.core.config.run import RunConfig

if TYPE_CHECKING:
    import torch

CLIP, WEIGHT_DECAY, LEARNING_RATE = 1.0, 0.01, 1e-4
"""Of every side; the betas and the epsilon are torch's defaults, which are the trainer's too."""

REPEAT = 4
"""Batches after which the same text comes again: a curve that falls tells optimizers apart."""


class Unable(Exception):
    """A side cannot take a case; the text says why. It is reported, and the others go on."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model in one shape."""

    label: str
    config: RunConfig
    documents: int
    """Of unequal lengths in a packed row; 1 is a row that is not packed."""
    gate_steps: int
    """Steps whose losses are compared. They come first and warm up."""
    steps: int
    """Steps of each of two timed stretches."""
    profile: bool
    disturbed: str | None
    """The side whose weights differ."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Where the documents of a row end, from 0 on: the n-th is n times as long as the first."""
        length, count = self.config.train.seq_length, self.documents
        whole = count * (count + 1) // 2
        return tuple(length * number * (number + 1) // 2 // whole for number in range(count + 1))

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.train.micro_batch_size * self.config.train.seq_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What a step spends on one kernel, on a CPU on one operator."""

    name: str
    calls: float
    """Of a step."""
    milliseconds: float
    """Of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """A step seen by torch's profiler."""

    kernels: tuple[Kernel, ...]
    """All of them, the longest first."""
    launches: float
    """Launches of a step by the host; 0 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one side measured of one case in one round."""

    side: str
    case: str
    about: str = ""
    """What the side chose: attention, kernels, optimizer."""
    losses: tuple[float, ...] = ()
    """Of the gate's steps."""
    norm: float = 0.0
    """Of the first step's gradient, before clipping."""
    seconds: tuple[float, ...] = ()
    """Mean of a step, by timed stretch."""
    peak_bytes: int | None = None
    """Most that was allocated on the device during the steps; None on a CPU."""
    profiled: Profiled | None = None
    reason: str = ""
    """Why nothing was measured."""
    failed: bool = False
    """That reason is neither a lack of memory nor a known inability."""
    left_bytes: int = 0
    """Still allocated when all was given back: too much spoils the next case."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a side's process says of itself."""

    device: str
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    missing: str = ""
    """Why this side cannot run here at all."""
    failed: bool = False
    """That is not for want of a package."""


def batch_of(case: Case, number: int) -> dict[str, torch.Tensor]:
    """The batch of a step, on the host.

    `tokens`, `labels`, `position_ids` int64 and `loss_mask` fp32 `[B, S]`, `sample_ids` int64 `[B]`, and of a packed
    row `cu_seqlens` int32 `[documents + 1]`. Small tokens are frequent, so that there is something to learn.
    """
    import torch

    train, vocabulary = case.config.train, case.config.model.foundation.geometry.vocab_size
    rows, length = train.micro_batch_size, train.seq_length
    generator = torch.Generator().manual_seed(train.seed + number % REPEAT)
    text = (vocabulary * torch.rand(rows, length + 1, generator=generator) ** 3).long().clamp(max=vocabulary - 1)
    ends = case.boundaries
    places = torch.cat([torch.arange(end - start) for start, end in pairwise(ends)])
    mask = torch.ones(rows, length)
    mask[:, [end - 1 for end in ends[1:-1]]] = 0  # the next token is another document's
    batch = {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": places.expand(rows, length).contiguous(),
        "sample_ids": torch.arange(rows) + rows * number,
    }
    return batch | ({"cu_seqlens": torch.tensor(ends, dtype=torch.int32)} if case.documents > 1 else {})
