"""Gradient buckets, optimizer and schedule, all megatron-core's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from loongforge.core.megatron.groups import World
from loongforge.core.megatron.transformer_config import compute_type
from loongforge.core.model.build import Model
from loongforge.core.model.omni import OmniCombinationModel
from loongforge.core.plan import Plan
from loongforge.core.step import apart
from loongforge.core.step.visual import Ahead, Feed, Inline, NoFeed


@dataclass(frozen=True, kw_only=True)
class Training:
    """What changes from step to step besides the position in the data."""

    chunks: list[Any]
    """Chunks of the foundation, wrapped by megatron-core's DistributedDataParallel; none on ranks of an encoder that
    has its own."""
    optimizer: Any
    """megatron-core's optimizer over all chunks, None without chunks."""
    schedule: Any
    """megatron-core's OptimizerParamScheduler; counts samples."""
    feed: Feed
    """Where the foundation's images come from."""
    tower: Any = None
    """Encoder and projector in their own DistributedDataParallel, None where this rank has none."""
    tower_optimizer: Any = None
    """megatron-core's optimizer over the tower, on the encoder's grid."""

    @property
    def config(self) -> Any:
        """megatron-core's TransformerConfig of the chunks, or of the encoder where it stands alone."""
        return self.wrapped[0].config

    @property
    def wrapped(self) -> list[Any]:
        """Everything with gradient buckets."""
        return [*self.chunks, self.tower] if self.tower is not None else list(self.chunks)

    @property
    def optimizers(self) -> list[Any]:
        """megatron-core's optimizers of this rank."""
        return [one for one in (self.optimizer, self.tower_optimizer) if one is not None]


class ParamGroups:
    """What megatron-core's schedule needs of an optimizer, over several."""

    def __init__(self, optimizers: Sequence[Any]) -> None:
        self._optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them as they are now."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]


def build_training(plan: Plan, world: World, model: Model) -> Training:
    """Wrap the chunks, build AdamW over fp32 main parameters and the schedule."""
    chunks = wrap(plan, world, model.chunks)
    optimizer = tower = tower_optimizer = None
    feed: Feed = NoFeed()
    if chunks:
        groups = None if world.shores is None else world.groups  # None: megatron-core's globals
        optimizer = build_optimizer(plan, world, chunks, foundation_rates(plan), groups)
    else:
        accompany_optimizer()
    if model.tower is not None:
        assert world.encoder is not None, "a tower has its grid"
        tower = wrap_tower(plan, model.tower, world.encoder.groups)
        tower_optimizer = build_optimizer(plan, world, [tower], tower_rates(plan), world.encoder.groups)
        feed = NoFeed() if world.shores else build_feed(plan, world, tower)
    elif plan.encoder is not None:
        accompany_optimizer()
    every = [one for one in (optimizer, tower_optimizer) if one is not None]
    if world.shores is not None:
        feed = apart.Apart(plan, world, chunks[0] if chunks else tower)
    training = Training(
        chunks=chunks, optimizer=optimizer, tower=tower, tower_optimizer=tower_optimizer, feed=feed,
        schedule=build_schedule(plan, ParamGroups(every)),
    )  # fmt: skip
    _connect(plan, world, training)
    return training


def build_feed(plan: Plan, world: World, tower: Any) -> Feed:
    """Features in each forward pass or ahead of the pipeline, as the layout says."""
    assert world.encoder is not None, "a tower has its grid"
    omni = OmniCombinationModel(tower, world.encoder, world.tp, split=plan.layout.sp)
    if world.encoder.layout.mode == "ahead":
        return Ahead(omni, world, offload=plan.config.parallel.full_hetero_dp_cpu_offload)
    return Inline(omni)


def wrap(plan: Plan, world: World, chunks: list[torch.nn.Module]) -> list[Any]:
    """Precision wrapper and gradient buckets around every chunk."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.module import Float16Module

    train = plan.config.train
    wrapped: list[Any] = []
    for number, chunk in enumerate(chunks):
        config: Any = chunk.config
        inner = Float16Module(config, chunk) if train.precision == "bf16" else chunk
        wrapped.append(
            DistributedDataParallel(
                config, _bucketing(plan), inner, disable_bucketing=number > 0, pg_collection=world.groups
            )
        )
    return wrapped


def wrap_tower(plan: Plan, tower: Any, groups: Any) -> Any:
    """Gradient buckets around the tower, on its own grid; it casts its input itself.

    Its parameters are gathered right after the update: megatron-core waits for an overlapped gather in the call of the
    module that owns a parameter, and an encoder may use one outside of it (a position table).
    """
    from megatron.core.distributed import DistributedDataParallel

    bucketing = replace(_bucketing(plan), overlap_param_gather=False)
    return DistributedDataParallel(tower.config, bucketing, tower, pg_collection=groups)


def _bucketing(plan: Plan) -> Any:
    from megatron.core.distributed import DistributedDataParallelConfig

    parallel = plan.config.parallel
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=plan.config.train.grad_reduce_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        bucket_size=parallel.ddp_bucket_size,
    )


def foundation_rates(plan: Plan) -> dict[str, float]:
    """Multiplier of the learning rate by pattern of parameter names; the foundation's optimizer has nothing else."""
    return {"*": plan.config.model.foundation.lr_mult}


def tower_rates(plan: Plan) -> dict[str, float]:
    """The same for the components of the tower, whose names begin the parameters' own."""
    slots = plan.config.model.components
    return {f"*{name}.*": component.lr_mult for name, component in slots.items() if name != "foundation"}


def build_optimizer(
    plan: Plan, world: World, modules: list[Any], rates: Mapping[str, float], groups: Any = None
) -> Any:
    """megatron-core's AdamW; vectors and biases are not decayed, components learn at lr x their `lr_mult`.

    The warm-up starts at the run's lr_warmup_init for every component. `groups` are those of a grid of its own.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer.optimizer_config import ParamKey
    from megatron.core.optimizer_param_scheduler import ParamGroupOverride

    section, train = plan.config.optimizer, plan.config.train
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        clip_grad=section.clip_grad,
        bf16=train.precision == "bf16",
        params_dtype=compute_type(train),
        use_distributed_optimizer=plan.config.parallel.use_distributed_optimizer,
    )
    overrides = get_standard_config_overrides(config)
    for pattern, multiplier in rates.items():
        if multiplier != 1.0:
            scaled = ParamGroupOverride(max_lr=section.lr * multiplier, min_lr=section.min_lr * multiplier)
            overrides[ParamKey(name=pattern)] = scaled
    optimizer = get_megatron_optimizer(
        config, modules, config_overrides=overrides, pg_collection=groups, use_gloo_process_groups=groups is None
    )
    if world.platform.device_type in ("cpu", "cuda"):  # what torch has the fused one for
        fuse_adamw(optimizer)
    _own_gradients(optimizer)
    return optimizer


def accompany_optimizer() -> None:
    """Answer on a rank without a component while the others build its optimizer.

    megatron-core compares parameter groups over all ranks of the job, whatever groups it is given, once for dense and
    once for expert parameters (optimizer/__init__.py, _get_param_groups). Remove when it asks its own groups.
    """
    answers: list[Any] = [None] * dist.get_world_size()
    for _ in range(2):
        dist.all_gather_object(answers, [])


def gather_parameters(chunks: list[Any]) -> None:
    """Make every rank's parameters current.

    With overlap_param_gather the shards updated by the last step are gathered only by the next forward pass; whoever
    reads parameters in between calls this first.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The torch optimizers behind megatron-core's, empty ones left out."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in parts if getattr(part, "optimizer", None) is not None]


def fuse_adamw(optimizer: Any) -> None:
    """Choose torch's fused AdamW: one pass over parameter, gradient and moments instead of about ten.

    megatron-core builds `torch.optim.AdamW` without passing `fused`; the choice is an ordinary field of its groups.
    """
    for inner in inner_optimizers(optimizer):
        if type(inner) is torch.optim.AdamW:
            inner.defaults["fused"] = True
            for group in inner.param_groups:
                group["fused"] = True


def _own_gradients(optimizer: Any) -> None:
    """Let the fp32 shards of the distributed optimizer have a `grad`.

    They are views of the parameters, not leaves, and megatron-core sets and reads their gradient: torch warns each time
    that it may be absent, unless it is asked to be kept.
    """
    for inner in inner_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not parameter.is_leaf:
                    parameter.retain_grad()


def build_schedule(plan: Plan, optimizer: Any) -> Any:
    """megatron-core's learning-rate and weight-decay schedule, counted in samples."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    section, batch = plan.config.optimizer, plan.global_batch_size
    decay_iters = section.lr_decay_iters or plan.train_iters
    warmup = section.lr_warmup_iters * batch
    if section.lr_warmup_fraction is not None:
        warmup = int(section.lr_warmup_fraction * decay_iters * batch)
    decay = decay_iters * batch
    start = section.weight_decay if section.start_weight_decay is None else section.start_weight_decay
    end = section.weight_decay if section.end_weight_decay is None else section.end_weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=section.lr_warmup_init,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=min(warmup, decay - 1),
        lr_decay_steps=decay,
        lr_decay_style=section.lr_decay_style,
        start_wd=start,
        end_wd=end,
        wd_incr_steps=plan.train_iters * batch,
        wd_incr_style=section.weight_decay_incr_style,
        wsd_decay_steps=None if section.lr_wsd_decay_iters is None else section.lr_wsd_decay_iters * batch,
        lr_wsd_decay_style=section.lr_wsd_decay_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run follows its configuration, not what it was saved with
    )


def _connect(plan: Plan, world: World, training: Training) -> None:
    """Hand megatron-core's schedules the callbacks they look up in the configuration."""
    config = training.config
    config.grad_scale_func = training.optimizers[0].scale_loss
    finish = finish_gradients if world.shores is None else apart.finish_gradients
    config.finalize_model_grads_func = partial(finish, world=world, training=training)
    if plan.config.parallel.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in training.chunks]
        if training.tower is not None:
            syncs[:1] = [partial(_together, *syncs[:1], training.tower.no_sync)]
        config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]


@contextmanager
def _together(*contexts: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        yield


def finish_gradients(
    chunks: list[Any],
    num_tokens: torch.Tensor | None = None,
    *,
    world: World,
    training: Training,
    pg_collection: Any = None,
    force_all_reduce: bool | None = False,
) -> None:
    """megatron-core's last work on gradients for the foundation, then for the tower over its own copies.

    Both are sums over tokens and are divided by the same number of unmasked tokens, that of the whole batch: the
    foundation's call leaves it in `num_tokens`. Every image is encoded once, so the tower's sum has each gradient once.
    """
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(chunks, num_tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
    training.feed.finish()
    if training.tower is None:
        return
    assert num_tokens is not None, "gradients are sums over tokens"
    finalize_model_grads([training.tower], None, pg_collection=world.encoder_groups, force_all_reduce=force_all_reduce)
    training.tower.scale_gradients(1.0 / torch.clamp(num_tokens, min=1))
