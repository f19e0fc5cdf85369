"""Refuse an update that would write NaN or infinity into the weights, and say where it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from loongforge.core.errors import TrainingError
from loongforge.core.megatron.groups import World

REMEDY = (
    "Nothing was updated. Look at these samples, lower --lr, or go on with watch.check_for_nan_in_loss_and_grad=false."
)
SHOWN = 3
"""Parameters named in a message."""


def require_finite_loss(
    loss: float,
    local_sums: Sequence[torch.Tensor],
    micro_batches: Sequence[Mapping[str, torch.Tensor]],
    step: int,
    world: World,
) -> None:
    """Raise `TrainingError` naming the ranks and samples whose loss is not finite.

    `loss` is the global mean, equal on all ranks, so that all of them arrive at the exchange or none does; `local_sums`
    hold sum and count of each of this rank's micro-batches, and are empty before the last pipeline stage.
    """
    if math.isfinite(loss):
        return
    samples: list[int] = []
    if world.tp.rank() == 0:  # tensor parallel ranks hold the same loss
        for sums, batch in zip(local_sums, micro_batches, strict=False):
            if not bool(torch.isfinite(sums).all()):
                samples += batch["sample_ids"].tolist()
    ranks = {rank: bad for rank, bad in enumerate(world.gather(samples)) if bad}
    where = "; ".join(f"rank {rank}, samples {_listed(bad)}" for rank, bad in ranks.items())
    raise TrainingError(f"loss is {loss} at step {step + 1}: {where}. {REMEDY}")


def require_finite_gradients(
    norm: float, chunks: Sequence[Any], micro_batches: Sequence[Mapping[str, torch.Tensor]], step: int, world: World
) -> None:
    """Raise `TrainingError` naming the ranks and parameters whose gradient is not finite, and the samples of the step.

    `norm` is the global norm, equal on all ranks. Gradients are already summed over data parallel ranks.
    """
    if math.isfinite(norm):
        return
    names = [name for chunk in chunks for name, parameter in chunk.named_parameters() if _ill(parameter)]
    samples = [number for batch in micro_batches for number in batch["sample_ids"].tolist()]
    answers = world.gather((names, samples))
    places = [f"rank {rank}: {_first(found)}" for rank, (found, _) in enumerate(answers) if found]
    where = "; ".join(places) or "every entry is finite, their squares overflow"
    seen = _listed({number for _, part in answers for number in part})
    raise TrainingError(f"gradient norm is {norm} at step {step + 1} ({where}), samples {seen}. {REMEDY}")


def _ill(parameter: Any) -> bool:
    gradient = getattr(parameter, "main_grad", None)
    return gradient is not None and not bool(torch.isfinite(gradient).all())


def _first(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))
