"""The losses of multi-token prediction: how each depth weighs, and what a step measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from loongforge.core.megatron.groups import World
from loongforge.core.plan import Plan
from loongforge.core.step.batch import MicroBatch, further_on, of_all_replicas

Batch = Mapping[str, torch.Tensor]


def depth_weights(plan: Plan, world: World, micro_batches: Sequence[Batch]) -> tuple[float, ...]:
    """What each depth's sum of losses is multiplied by beside the model's own, in a step of these micro-batches.

    Training adds the mean over depths, times its factor (DeepSeek-V3, 2024, eq. 25), of each depth's mean over the
    tokens that it predicts and that count, of the global batch. megatron-core divides every gradient by the tokens that
    count for the model's own loss. Empty without further layers; collective over data parallel ranks with them.
    """
    depths = plan.geometry.prediction_layers
    if not depths:
        return ()
    counts = torch.zeros(1 + depths, dtype=torch.float64)
    for batch in micro_batches:
        masks = [batch["loss_mask"], *further_on(batch, "loss_mask", depths)]
        counts += torch.stack([mask.sum(dtype=torch.float64) for mask in masks])
    own, *further = of_all_replicas(counts, world)
    share = plan.geometry.prediction_loss_coeff / depths
    return tuple(share * own / count if count else 0.0 for count in further)


def masked_sums(
    losses: torch.Tensor, batch: MicroBatch, weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What gradients are taken of, the tokens that count, and sum and count of unmasked losses of the model's own and
    of each depth's, fp64 `[1 + D, 2]`; `losses` are `[B, S]`, or `[1 + D, B, S]` with further layers.
    """
    masks = batch.loss_mask[None]
    if batch.ahead is not None:
        masks = torch.cat([masks, batch.ahead.loss_mask])
    sums = (losses.float().view_as(masks) * masks).sum((1, 2))
    counts = masks.sum((1, 2))
    total = sums[0]
    for weight, further in zip(weights, sums[1:], strict=True):
        total = total + weight * further
    return total, counts[0].to(torch.int), torch.stack([sums.detach().double(), counts.double()], dim=1)


def prediction_numbers(means: Sequence[float]) -> dict[str, float]:
    """`mtp_loss`, the mean over depths, and where there are several `mtp_loss_1` and so on."""
    if not means:
        return {}
    each = {f"mtp_loss_{depth}": mean for depth, mean in enumerate(means, 1)} if len(means) > 1 else {}
    return {"mtp_loss": sum(means) / len(means), **each}
