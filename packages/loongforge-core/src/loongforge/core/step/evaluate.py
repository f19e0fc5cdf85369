"""Held-out loss while training."""

from __future__ import annotations

from loongforge.core.data.open import Data
from loongforge.core.megatron.groups import World
from loongforge.core.plan import Plan
from loongforge.core.step.forward import evaluate
from loongforge.core.step.optimizer import Training


def held_out_loss(plan: Plan, world: World, training: Training, data: Data, step: int) -> dict[str, float]:
    """`{"valid_loss": mean over unmasked held-out tokens}` when the run is due for it after `step`, else empty."""
    interval = plan.config.train.eval_interval
    if data.valid is None or not (step == plan.train_iters or (interval and step % interval == 0)):
        return {}
    total, tokens = 0.0, 0
    for micro_batches in data.held_out():
        loss, count = evaluate(plan, world, training, micro_batches)
        total, tokens = total + loss * count, tokens + count
    return {"valid_loss": total / max(1, tokens)}
