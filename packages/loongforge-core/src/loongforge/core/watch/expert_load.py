"""How evenly the tokens of a step spread over the experts of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """One layer's experts over the global batch, as the router chose, before anything was dropped."""

    imbalance: float
    """Tokens of the busiest expert relative to the mean; 1 is even."""
    least: float
    """Tokens of the idlest expert relative to the mean."""
    idle: float
    """Share of experts without a token."""
    dropped: float
    """Share of the choices that found no place within the capacity."""

    @classmethod
    def of(cls, counts: Sequence[float], *, kept: float) -> Self:
        """From the tokens of every expert, at least one in all, and how many of them were `kept`."""
        total = sum(counts)
        mean = total / len(counts)
        return cls(
            imbalance=max(counts) / mean,
            least=min(counts) / mean,
            idle=sum(count == 0 for count in counts) / len(counts),
            dropped=1 - kept / total,
        )


def load_numbers(loads: Mapping[int, ExpertLoad], *, drops: bool) -> dict[str, float]:
    """Numbers of every layer by name, `expert_load/max/layer_3`; the dropped share where a capacity `drops`."""
    numbers: dict[str, float] = {}
    for layer, load in loads.items():
        numbers[f"expert_load/max/layer_{layer}"] = load.imbalance
        numbers[f"expert_load/min/layer_{layer}"] = load.least
        numbers[f"expert_load/idle/layer_{layer}"] = load.idle
        if drops:
            numbers[f"expert_load/dropped/layer_{layer}"] = load.dropped
    return numbers
