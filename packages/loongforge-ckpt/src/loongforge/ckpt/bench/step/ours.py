"""The trainer's own step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loongforge.ckpt.bench.step.case import Case, Unable
from loongforge.ckpt.bench.step.worker import Step, optimizer_name
from loongforge.core import env
from loongforge.core.platform import Platform, choose

ALONE = env.Worker(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="single")


def prepare() -> None:
    """Import what a case needs."""
    from loongforge.core.megatron.start import preload

    preload(choose().platform())


@contextmanager
def plain(case: Case) -> Iterator[tuple[Step, str]]:
    """With our own layers, also where TransformerEngine is installed."""
    platform = choose().platform()
    setattr(platform, "capabilities", frozenset)  # noqa: B010 - of this one object
    with _step(case, platform, "ours") as found:
        yield found


@contextmanager
def engine(case: Case) -> Iterator[tuple[Step, str]]:
    """With TransformerEngine's layers."""
    platform = choose().platform()
    if "te" not in platform.capabilities():
        raise Unable(f"transformer-engine is not installed, or not of use on platform {platform.name}")
    with _step(case, platform, "ours-te") as found:
        yield found


@contextmanager
def _step(case: Case, platform: Platform, side: str) -> Iterator[tuple[Step, str]]:
    from loongforge.ckpt.bench.step.drawn import Drawn, fill
    from loongforge.core.checkpoint.parts import part_of
    from loongforge.core.megatron.groups import join
    from loongforge.core.model.build import build_model
    from loongforge.core.plan import Plan
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import build_training, inner_optimizers

    plan = Plan.of(case.config, 1)
    with join(plan.layout, ALONE, platform, 5) as world:
        model = build_model(plan, world, fresh=())
        drawn = Drawn(seed=case.config.train.seed, device=world.device, disturbed=case.disturbed == side)
        fill(part_of(plan, world, model.chunks, None, "foundation"), drawn)
        training = build_training(plan, world, model)

        def step(batch: Any, number: int) -> tuple[Any, Any]:
            found = train_step(plan, world, training, [batch], number)
            return found.loss, found.grad_norm

        chosen = "; ".join((f"{model.layers.name} layers", *model.layers.ops))
        yield step, f"{chosen}; {optimizer_name(inner_optimizers(training.optimizer)[0])}"
