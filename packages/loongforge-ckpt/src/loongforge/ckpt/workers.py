"""Workers for a command: started as the trainer starts its own, each with its part of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from loongforge.core import env
from loongforge.core.cli.launch import Entry, launch
from loongforge.core.config.run import RunConfig
from loongforge.core.errors import ConfigError

if TYPE_CHECKING:
    from loongforge.core.megatron.groups import World
    from loongforge.core.model.build import Model
    from loongforge.core.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one worker works with."""

    plan: Plan
    world: World
    model: Model


def run_workers(config: RunConfig, entry: Entry, verb: str) -> None:
    """Run `entry(config)` in as many workers on this node as the layout needs (`--nproc-per-node` for more)."""
    from loongforge.core.platform.choose import choose

    if env.worker() is not None or config.launch.nnodes > 1:
        raise ConfigError(
            f"loongforge {verb} starts its own workers on one node: run it without torchrun or srun, and in a "
            "container of a PyTorchJob without RANK and WORLD_SIZE."
        )
    platform = choose().platform()
    launch(
        config,
        entry,
        nproc=workers_of(config),
        preload=partial(_start, platform.name) if platform.fork_safe else None,
    )


def workers_of(config: RunConfig) -> int:
    """Workers of the command: as configured, or one copy of the model."""
    parallel = config.parallel
    model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    return config.launch.nproc_per_node or model + parallel.encoder_ranks


def _start(platform: str) -> None:
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform.choose import choose

    start_megatron(choose(platform).platform())


@contextmanager
def part_of(config: RunConfig) -> Iterator[Part]:
    """Join the other workers and build this one's model; everything ends with the block.

    Weights are unset where a directory is going to fill them.
    """
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.plan import Plan
    from loongforge.core.platform.choose import choose

    worker = env.worker()
    assert worker is not None, "the launcher sets this worker's place"
    platform = choose().platform()
    start_megatron(platform)
    from loongforge.core.megatron.groups import join

    plan = Plan.of(config, worker.world_size)
    with join(plan.layout, worker, platform, config.launch.distributed_timeout_minutes, plan.encoder) as world:
        from loongforge.core.checkpoint.sources import fresh_components
        from loongforge.core.checkpoint.start import find_start
        from loongforge.core.model.build import build_model

        fresh = fresh_components(config.model, find_start(config.checkpoint))
        yield Part(plan=plan, world=world, model=build_model(plan, world, fresh=fresh))
