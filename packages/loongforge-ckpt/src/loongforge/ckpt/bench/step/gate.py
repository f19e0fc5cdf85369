"""Whether the sides computed the same: times mean nothing before that is so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from loongforge.ckpt.bench.step.case import Result

LOSS: Mapping[str, float] = {"fp32": 1e-4, "bf16": 5e-3}
"""Largest relative difference of a loss of the first steps. Tiny models on a CPU: 2e-7 and 7e-4, ten layers over
eight steps 5e-4."""

NORM: Mapping[str, float] = {"fp32": 1e-4, "bf16": 3e-2}
"""Of the first gradient's norm: 2e-7 and 2.3e-3, with experts 1.2e-2."""

ROUNDED = ("transformers", 2e-2)
"""The side whose weights have no fp32 copy, and how far its losses may be in bf16: small updates are rounded away, and
its curve stays behind: 3e-3 after four steps, 1e-2 after eight and after twelve."""

ORDER = ("transformers-autocast", "megatron", "transformers")
"""Whom the others are compared with: the first that ran, code of others in the precision of ours before all."""


def reference_of(results: Mapping[str, Sequence[Result]]) -> str | None:
    """The side that the others are compared with; None when none ran."""
    ran = [name for name, found in results.items() if any(one.losses for one in found)]
    return next((name for name in (*ORDER, *ran) if name in ran), None)


def distance(result: Result, other: Result) -> tuple[float, float]:
    """Of the losses and of the first gradient's norm, relative to `other`; infinite where something is not a number."""
    loss = max(_apart(mine, theirs) for mine, theirs in zip(result.losses, other.losses, strict=True))
    return loss, _apart(result.norm, other.norm)


def differences(results: Mapping[str, Sequence[Result]], precision: str) -> list[str]:
    """A sentence for every side and round that differs from the reference by more than the tolerance."""
    reference = reference_of(results)
    if reference is None:
        return []
    other = next(one for one in results[reference] if one.losses)
    found: list[str] = []
    for name, rounds in results.items():
        for number, result in enumerate(rounds, 1):
            if not result.losses:
                continue
            loss, norm = distance(result, other)
            most = ROUNDED[1] if precision == "bf16" and ROUNDED[0] in (name, reference) else LOSS[precision]
            if loss > most or norm > NORM[precision]:
                found.append(
                    f"{name}, round {number}: losses of the first {len(result.losses)} steps differ by {loss:.1e} from "
                    f"those of {reference} (at most {most:g}), the first gradient's norm by {norm:.1e} (at "
                    f"most {NORM[precision]:g})."
                )
    return found


def _apart(mine: float, theirs: float) -> float:
    difference = abs(mine - theirs) / abs(theirs) if theirs else math.inf
    return difference if math.isfinite(difference) else math.inf
