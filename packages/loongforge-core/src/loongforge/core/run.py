"""The story of a run: config -> plan -> model -> data -> step -> checkpoint."""

from __future__ import annotations

import random
import sys
import time
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from loongforge.core import env
from loongforge.core.config.run import RunConfig
from loongforge.core.errors import PREEMPTED_EXIT_CODE
from loongforge.core.plan import Plan
from loongforge.core.platform import Choice, choose
from loongforge.core.watch import StepReport, Watch
from loongforge.core.watch.announce import announce, farewell

if TYPE_CHECKING:
    from loongforge.core.megatron.groups import World
    from loongforge.core.step.optimizer import Training
    from loongforge.core.step.stop import Stop


def train(config: RunConfig) -> None:
    """Run as configured, in this process's place among the workers.

    Exits with 75 when it was asked to stop early and has saved; raises a `ForgeError` for everything a user can mend.
    """
    worker = env.worker() or env.Worker(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="single")
    plan = Plan.of(config, worker.world_size)
    choice = choose(config.platform)

    from loongforge.core.step.stop import Stop

    with Stop(config.train) as stop:  # from here on a signal waits until there is something to save
        _train(plan, choice, worker, stop)


def _train(plan: Plan, choice: Choice, worker: env.Worker, stop: Stop) -> None:
    from loongforge.core.megatron.start import start_megatron

    config, platform = plan.config, choice.platform()
    start_megatron(platform)  # before anything that imports megatron-core
    from loongforge.core.checkpoint.directory import open_run_directory
    from loongforge.core.checkpoint.load import check_fingerprint, load_training, load_weights
    from loongforge.core.checkpoint.save import Saver
    from loongforge.core.checkpoint.sources import fresh_components
    from loongforge.core.checkpoint.start import find_start
    from loongforge.core.data.balance import require_one_deal
    from loongforge.core.data.open import open_data
    from loongforge.core.megatron.groups import join
    from loongforge.core.model.build import build_model
    from loongforge.core.step.busy import busy_times
    from loongforge.core.step.evaluate import held_out_loss
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import build_training

    seed_host(config)
    with join(plan.layout, worker, platform, config.launch.distributed_timeout_minutes, plan.encoder) as world:
        start = find_start(config.checkpoint)
        directory = open_run_directory(config, world)
        data = open_data(plan, world, start)
        notes = check_fingerprint(start, data.fingerprint(), config.checkpoint.allow)
        model = build_model(plan, world, fresh=fresh_components(config.model, start))
        notes += load_weights(plan, world, model, start)
        training = build_training(plan, world, model)
        notes += load_training(plan, world, training, start)
        busy = busy_times(plan, world, training)
        with (
            Watch(config, directory, world.is_main, plan.train_iters, start.step) as watch,
            data.loader(start.consumed_samples) as loader,
            Saver(plan, world, data.fingerprint(), watch.note) as saver,
        ):
            announce(watch, plan, choice, model, data, [str(start), *notes])
            if start.step >= plan.train_iters:
                watch.note(f"All {plan.train_iters} steps are done: nothing to train.")
                _export(plan, world, training, watch)  # a run killed between its last checkpoint and the export
            elif stop.requested(world):
                _leave(watch, config, start.step)
            for step in range(start.step, plan.train_iters):
                began, waited = time.perf_counter(), loader.waited
                micro_batches = loader.step()
                require_one_deal(loader.deal, world, step, start.step)
                with busy(step, micro_batches):
                    result = train_step(plan, world, training, micro_batches, step)
                platform.synchronize()
                seconds = time.perf_counter() - began
                watch.step(
                    StepReport(
                        step=step + 1,
                        loss=result.loss,
                        grad_norm=result.grad_norm,
                        lr=result.lr,
                        tokens=plan.tokens_per_step,
                        loss_tokens=result.loss_tokens,
                        consumed_samples=loader.position,
                        seconds=seconds,
                        data_wait_seconds=loader.waited - waited,
                        tokens_per_second=plan.tokens_per_step / seconds,
                        peak_memory_bytes=platform.memory().peak,
                        detail=result.detail,
                        extra={
                            **result.extra,
                            **(loader.deal.numbers if loader.deal is not None else {}),
                            **held_out_loss(plan, world, training, data, step + 1),
                            **data.quarantine.numbers(),
                        },
                    )
                )
                saver.poll()
                last, stopping = step + 1 == plan.train_iters, stop.requested(world)
                if last or stopping or due(step + 1, config.checkpoint.save_interval):
                    saver.save(training, step + 1, loader.position, data.quarantine.state())
                    _export(plan, world, training, watch)
                if last and len(data.quarantine):
                    watch.note(str(data.quarantine))
                if stopping and not last:
                    saver.finish()
                    _leave(watch, config, step + 1)


def _export(plan: Plan, world: World, training: Training, watch: Watch) -> None:
    from loongforge.core.checkpoint.export import export_if_asked

    if exported := export_if_asked(plan, world, training):
        watch.note(f"Hugging Face weights: {exported}")


def _leave(watch: Watch, config: RunConfig, step: int) -> NoReturn:
    watch.note(farewell(config, step))
    sys.exit(PREEMPTED_EXIT_CODE)


def seed_host(config: RunConfig) -> None:
    """Seed the host's generators; megatron-core's tracker seeds those of the model."""
    seed = config.train.seed
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if config.train.deterministic:
        env.repeat_cublas()
    torch.use_deterministic_algorithms(config.train.deterministic)


def due(step: int, interval: int | None) -> bool:
    """Whether something that happens every `interval` steps happens now."""
    return interval is not None and step % interval == 0
