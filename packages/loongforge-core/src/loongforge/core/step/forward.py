"""One optimizer step: all micro-batches forward and backward through the pipeline, then clip and update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from loongforge.core.megatron.groups import World
from loongforge.core.plan import Plan
from loongforge.core.platform.sending import sent
from loongforge.core.step.ahead import depth_weights, masked_sums, prediction_numbers
from loongforge.core.step.apart import Apart
from loongforge.core.step.batch import of_all_replicas, to_device
from loongforge.core.step.finite import require_finite_gradients, require_finite_loss
from loongforge.core.step.optimizer import Training
from loongforge.core.step.visual import Feed, NoFeed

Batch = Mapping[str, torch.Tensor]
Numbered = tuple[int, Batch]
"""A micro-batch and its number in the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step measured, equal on all ranks."""

    loss: float
    """Mean over the unmasked tokens of the global batch."""
    loss_tokens: int
    """Unmasked tokens of the global batch."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Learning rate the step used."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name: `mtp_loss` of further prediction layers, the mean over depths; of a model with experts
    `load_balancing_loss`, 1 when they are used evenly, and `expert_load`, the tokens of the busiest expert of any layer
    relative to the mean; `indexer_loss` of indexers that learn, before its factor, the mean over layers and tokens."""
    detail: Mapping[str, float] = field(default_factory=dict)
    """Numbers of every layer by name, `expert_load/max/layer_3`, for files and trackers alone."""


def train_step(plan: Plan, world: World, training: Training, micro_batches: Sequence[Batch], step: int) -> StepResult:
    """Run one step over this rank's micro-batches, each with `sample_ids` int64 `[micro_batch_size]`.

    Raises the same `TrainingError` on all ranks, before the update, when the loss or the gradient norm is not finite.
    """
    for wrapped in training.wrapped:
        wrapped.zero_grad_buffer()
    for optimizer in training.optimizers:
        optimizer.zero_grad()
    if _has_layer_losses(plan):
        _weigh_layer_losses(training, world, micro_batches)
    sums = _run_schedule(plan, world, training.chunks, micro_batches, training.feed, forward_only=False)
    (loss, *further), tokens = _global_means(plan, sums, world)
    check = plan.config.watch.check_for_nan_in_loss_and_grad
    if check:
        require_finite_loss(sum(further, loss), sums, micro_batches, step, world)
    lr = training.schedule.get_lr({})  # the run's, whatever a component's multiplier
    for optimizer in training.optimizers:
        optimizer.prepare_grads()
    grad_norm = global_norm(plan, world, training)
    if check:
        require_finite_gradients(grad_norm, training.wrapped, micro_batches, step, world)
    _clip_and_update(plan, training, grad_norm)
    training.schedule.step(increment=plan.global_batch_size)
    extra, detail = _expert_numbers(plan, training, world)
    taught, by_layer = _index_numbers(plan, training, world)
    extra, detail = prediction_numbers(further) | extra | taught, detail | by_layer
    return StepResult(loss=loss, loss_tokens=tokens, grad_norm=grad_norm, lr=lr, extra=extra, detail=detail)


def _has_layer_losses(plan: Plan) -> bool:
    """Whether layers add losses of their own: routers, or indexers that choose keys."""
    experts = plan.geometry.experts
    routed = experts is not None and (experts.balance_coeff > 0 or plan.config.moe.moe_z_loss_coeff > 0)
    return routed or _teaches(plan)


def _teaches(plan: Plan) -> bool:
    """Whether a loss teaches indexers that choose keys."""
    latent = plan.geometry.latent
    return latent is not None and latent.index is not None and latent.index.loss_coeff > 0


def _weigh_layer_losses(training: Training, world: World, micro_batches: Sequence[Batch]) -> None:
    """Tell megatron-core which share of the global batch's tokens counts in the loss, before the step."""
    from loongforge.core.megatron.expert_numbers import weigh_layer_losses

    counts = torch.tensor(
        [[float(batch["loss_mask"].sum()), batch["loss_mask"].numel()] for batch in micro_batches],
        dtype=torch.float64,
    ).sum(0)  # fmt: skip
    loss_tokens, tokens = of_all_replicas(counts, world)
    weigh_layer_losses(training.config, int(loss_tokens), int(tokens))


def _expert_numbers(plan: Plan, training: Training, world: World) -> tuple[dict[str, float], dict[str, float]]:
    """For the step's line, and for every layer; nothing of a dense model. Collective."""
    if plan.geometry.experts is None:
        return {}, {}
    from loongforge.core.megatron.expert_numbers import take_expert_numbers
    from loongforge.core.watch.expert_load import load_numbers

    z_loss = plan.config.moe.moe_z_loss_coeff > 0
    found = take_expert_numbers(training.chunks, plan.geometry, world, plan.num_microbatches, z_loss=z_loss)
    extra = {} if found.balance_loss is None else {"load_balancing_loss": found.balance_loss}
    if found.loads:
        extra["expert_load"] = max(load.imbalance for load in found.loads.values())
    detail = load_numbers(found.loads, drops=plan.config.moe.moe_expert_capacity_factor is not None)
    return extra, detail if found.z_loss is None else {**detail, "router_z_loss": found.z_loss}


def _index_numbers(plan: Plan, training: Training, world: World) -> tuple[dict[str, float], dict[str, float]]:
    """For the step's line, and for every layer; nothing of a model whose indexers do not learn. Collective."""
    if not _teaches(plan):
        return {}, {}
    from loongforge.core.megatron.indexer import take_index_losses

    losses = take_index_losses(training.chunks, plan.geometry, world)
    detail = {f"indexer_loss/layer_{layer}": loss for layer, loss in losses.items()}
    return ({"indexer_loss": sum(losses.values()) / len(losses)} if losses else {}), detail


def evaluate(plan: Plan, world: World, training: Training, micro_batches: Sequence[Batch]) -> tuple[float, int]:
    """Mean loss over the unmasked tokens of all ranks' micro-batches, and their number; nothing changes."""
    for module in training.wrapped:
        module.eval()
    with torch.no_grad():
        result = forward_backward(plan, world, training.chunks, micro_batches, training.feed, forward_only=True)
    for module in training.wrapped:
        module.train()
    return result


def forward_backward(
    plan: Plan,
    world: World,
    chunks: list[Any],
    micro_batches: Sequence[Batch],
    feed: Feed | None = None,
    *,
    forward_only: bool,
) -> tuple[float, int]:
    """megatron-core's pipeline schedule over these micro-batches; the global mean loss and its tokens on every rank.

    `feed` brings the features of images; without one the model sees text alone.
    """
    sums = _run_schedule(plan, world, chunks, micro_batches, feed or NoFeed(), forward_only=forward_only)
    means, tokens = _global_means(plan, sums, world)
    return means[0], tokens


def _run_schedule(
    plan: Plan, world: World, chunks: list[Any], micro_batches: Sequence[Batch], feed: Feed, *, forward_only: bool
) -> list[torch.Tensor]:
    """Loss sum and count of every micro-batch, fp64 `[1 + D, 2]` each: the model's own and those of D further layers;
    this context parallel rank's part, last stage only."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    interleaved = plan.layout.vpp is not None
    iterators: list[Iterator[Numbered]] = [iter(list(enumerate(micro_batches))) for _ in chunks]
    feed.start(micro_batches)
    weights = depth_weights(plan, world, micro_batches)
    step = _forward_step(world, feed, chunks[0] if chunks and world.is_first_stage else None, weights)
    if isinstance(feed, Apart):
        return feed.run(step, micro_batches, forward_only=forward_only)
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if interleaved else iterators[0],
        model=chunks if interleaved else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=_row_length(micro_batches),
        micro_batch_size=micro_batches[0]["tokens"].size(0),
        forward_only=forward_only,
    )


def _row_length(micro_batches: Sequence[Batch]) -> int:
    return micro_batches[0]["tokens"].size(1)


def _forward_step(world: World, feed: Feed, first: Any, weights: Sequence[float]) -> Any:
    """The schedule's callback; `first` is the chunk that takes features, None where another stage does. `weights` are
    those of further layers' losses."""

    def forward_step(batches: Iterator[Numbered], chunk: Any) -> tuple[torch.Tensor, Any]:
        number, micro_batch = next(batches)
        batch = to_device(micro_batch, world, len(weights))
        visual = feed.visual(number) if chunk is first else None
        output = chunk(
            batch.tokens,
            position_ids=batch.position_ids,
            labels=batch.labels,
            packed=batch.packed,
            loss_mask=batch.loss_mask,
            **({} if visual is None else {"visual": visual}),
            **({} if batch.ahead is None else {"ahead": batch.ahead}),
        )
        return output, lambda losses: masked_sums(losses, batch, weights)

    return forward_step


def _global_means(plan: Plan, local_sums: list[torch.Tensor], world: World) -> tuple[list[float], int]:
    """Mean loss of the model's own and of each further layer's, and the tokens of the former; equal on all ranks."""
    sums = torch.zeros(1 + plan.geometry.prediction_layers, 2, dtype=torch.float64, device=world.device)
    # Every tensor parallel rank of the last stage holds the same loss: one of them counts.
    if world.is_last_stage and world.tp.rank() == 0:
        for local in local_sums:
            sums += local
    if world.size > 1:
        dist.all_reduce(sums)
    rows = sums.tolist()  # one wait for the device
    return [total / count if count else 0.0 for total, count in rows], int(rows[0][1])


def global_norm(plan: Plan, world: World, training: Training) -> float:
    """Norm of all gradients, equal on all ranks."""
    both = (training.optimizer, training.tower_optimizer)
    norms = [float(one.get_grad_norm() or 0.0) if one is not None else 0.0 for one in both]
    if plan.encoder is None:
        return norms[0]
    # A rank knows the norms of the components it holds; each is equal wherever it is known.
    known = torch.tensor([norm**2 for norm in norms], dtype=torch.float64)
    # Infinity must stay infinity: by default nan_to_num makes the largest number of it, whose root looks sound.
    known.nan_to_num_(nan=math.inf, posinf=math.inf)
    if world.size > 1:
        known = sent(known, world.device)
        dist.all_reduce(known, op=dist.ReduceOp.MAX)
    return math.sqrt(float(known.sum()))


def _clip_and_update(plan: Plan, training: Training, norm: float) -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    limit = plan.config.optimizer.clip_grad
    for optimizer in training.optimizers:
        if limit > 0:
            for part in getattr(optimizer, "chained_optimizers", [optimizer]):
                if parameters := part.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, limit, norm)
        optimizer.step_with_ready_grads()
