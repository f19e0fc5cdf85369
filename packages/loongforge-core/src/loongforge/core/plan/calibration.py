"""What a device took for steps of known work, and what a plan takes there: the only times that a plan knows.

`loongforge bench step --calibrate FILE` writes the measurements, `loongforge plan --calibration FILE` reads them. A
step is a time for each FLOP of matrices, one for each FLOP of attention and one for each parameter updated, fitted to
the cases; memory is the plan's own, scaled and shifted. The error shown is that of the case which the others tell
worst; a plan unlike all that was measured may be further off. Communication is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from loongforge.core.errors import ConfigError
from loongforge.core.plan.compute import flops_per_token, foundation_passes, pipeline_bubble
from loongforge.core.plan.encoder_memory import fullest_rank
from loongforge.core.plan.memory import stage_trained
from loongforge.core.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one rank does in a step, and holds, as a plan has it."""

    matrices: float
    """FLOPs of matrices, computed again where that is asked for."""
    attention: float
    """FLOPs that grow with the square of a document's length."""
    update: float
    """Parameters that this rank updates."""
    planned_bytes: int
    """Of the fullest rank."""

    @classmethod
    def of(cls, plan: Plan, boundaries: Sequence[int] = ()) -> Self:
        """The work of a plan; `boundaries` are where the documents of a packed row end, from 0 on."""
        length, layout = plan.seq_length, plan.layout
        matrices = flops_per_token(plan, 0)
        ends = boundaries or (0, length)
        whole = sum((end - start) * flops_per_token(plan, end - start) for start, end in pairwise(ends))
        passes = foundation_passes(plan)
        again = 1 + (plan.config.parallel.recompute_granularity == "full") / passes
        share = again * (1 + pipeline_bubble(plan)) * plan.global_batch_size / plan.world
        copies = layout.dp * layout.cp if plan.config.parallel.use_distributed_optimizer else 1
        return cls(
            matrices=share * length * matrices,
            attention=share * (whole - length * matrices),
            update=max(held.total for held in stage_trained(plan)) / copies,
            planned_bytes=fullest_rank(plan),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One case of a benchmark."""

    case: str
    work: Work
    seconds: float
    """Of a step."""
    peak_bytes: int | None
    """Most that was allocated; None where the device does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a plan takes on the device that was measured."""

    seconds: float
    peak_bytes: int | None
    seconds_error: float | None
    """Largest error of a case told by the others, relative; None with one case alone."""
    bytes_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Measurements of one device in one precision."""

    device: str
    date: str
    precision: str
    side: str
    """Which layers: `ours`, or `ours-te` with TransformerEngine."""
    cases: tuple[Measured, ...]

    def estimate(self, work: Work) -> Estimate:
        """Time and memory of that work, and how far to trust them."""
        told = [self.without(case).raw(case.work) for case in self.cases] if len(self.cases) > 1 else []
        seconds, peak = self.raw(work)
        times = [abs(one / case.seconds - 1) for (one, _), case in zip(told, self.cases, strict=False)]
        memory = [
            abs(one / case.peak_bytes - 1)
            for (_, one), case in zip(told, self.cases, strict=False)
            if one is not None and case.peak_bytes
        ]
        return Estimate(
            seconds=seconds,
            peak_bytes=None if peak is None else round(peak),
            seconds_error=max(times, default=None),
            bytes_error=max(memory, default=None),
        )

    def without(self, case: Measured) -> Calibration:
        """The other cases."""
        return replace(self, cases=tuple(one for one in self.cases if one is not case))

    def raw(self, work: Work) -> tuple[float, float | None]:
        """Seconds and bytes of that work."""
        seconds = _told([(_times(case.work), case.seconds) for case in self.cases], _times(work))
        held = [(_held(case.work), case.peak_bytes) for case in self.cases if case.peak_bytes is not None]
        return seconds, _told(held, _held(work)) if held else None

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file; `ConfigError` when it is none."""
        try:
            data: dict[str, Any] = json.loads(path.read_text())
            cases = tuple(Measured(work=Work(**case.pop("work")), **case) for case in data.pop("cases"))
            if not cases:
                raise ValueError("it holds no case")
            return cls(**data, cases=cases)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"--calibration {path}: cannot be read ({error}); `loongforge bench step --calibrate {path}` writes it."
            ) from error


Ladder = tuple[tuple[float, ...], ...]
"""The same work in more and more terms; a fit has at least one case more than it has terms, one term apart."""


def _times(work: Work) -> Ladder:
    whole = work.matrices + work.attention
    return (whole,), (whole, work.update), (work.matrices, work.attention, work.update)


def _held(work: Work) -> Ladder:
    return (work.planned_bytes,), (work.planned_bytes, 1.0)


def _told(cases: Sequence[tuple[Ladder, float]], asked: Ladder) -> float:
    """What the cases say of `asked`, by the most terms that they allow and that all come out positive.

    Least squares of the relative error.
    """
    import numpy as np

    for level in reversed(range(1, len(asked))):
        if len(cases) <= len(asked[level]):
            continue
        terms = np.array([[one / value for one in ladder[level]] for ladder, value in cases])
        scale = np.abs(terms).max(0)
        found, *_, rank, _ = np.linalg.lstsq(terms / scale, np.ones(len(cases)), rcond=None)
        if rank == terms.shape[1] and (found > 0).all():
            return float(np.dot(found / scale, asked[level]))
    rates = sorted(value / ladder[0][0] for ladder, value in cases)
    return asked[0][0] * (rates[(len(rates) - 1) // 2] + rates[len(rates) // 2]) / 2
