"""Tiny models with experts on any layout, and how far their gradients are from transformers'."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from reference_experts import (
    LENGTH,
    SAMPLES,
    Measured,
    Place,
    batch,
    choices,
    deepseek3,
    qwen3_moe,
    reference_gradients,
)

from loongforge.core.config.experts import ExpertConfig
from loongforge.core.config.run import ComponentConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from loongforge.core.env import Worker
from loongforge.core.megatron.context_parallel import local_indices
from loongforge.core.megatron.expert_numbers import take_expert_numbers, weigh_layer_losses
from loongforge.core.megatron.groups import World, join
from loongforge.core.megatron.language_model import LanguageModel
from loongforge.core.megatron.layers import PackedRow
from loongforge.core.megatron.specs import layers_for
from loongforge.core.megatron.transformer_config import transformer_config
from loongforge.core.model.contract import BuildContext
from loongforge.core.model.geometry import TransformerGeometry
from loongforge.core.model.names import whole_model_name, whole_model_names
from loongforge.core.plan.layout import Layout
from loongforge.core.platform import choose

__all__ = [
    "LENGTH", "SAMPLES", "Measured", "Place", "batch", "choices", "chunk_of", "deepseek3", "expert_biases", "layout",
    "load", "measure", "part", "qwen3_moe", "reference_gradients", "whole_model_names", "worst",
]  # fmt: skip


def layout(world: int, *, tp: int = 1, cp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1) -> Layout:
    """`world` ranks; data parallelism takes what is left."""
    return Layout(
        world=world, tp=tp, cp=cp, dp=world // (tp * cp * pp), pp=pp, vpp=None, ep=ep, etp=etp, sp=tp > 1
    )  # fmt: skip


COLUMN = re.compile(r"(linear_(qkv|q_proj|q_up_proj|kv_up_proj)|word_embeddings|output_layer)\.weight$")
ROW = re.compile(r"linear_(proj|fc2)\.weight$")


def part(name: str, tensor: torch.Tensor, place: Place) -> torch.Tensor:
    """The rows or columns of a whole tensor that a rank holds."""
    size, rank = (place.etp, place.etp_rank) if "local_experts" in name else (place.tp, place.tp_rank)
    if name.endswith("linear_fc1.weight"):  # the gate's part above the up matrix's
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    if COLUMN.search(name):
        return tensor.chunk(size)[rank]
    return tensor.chunk(size, 1)[rank] if ROW.search(name) else tensor


@contextmanager
def chunk_of(
    geometry: TransformerGeometry,
    where: Layout,
    worker: Worker,
    parallel: ParallelConfig | None = None,
    moe: ExpertConfig | None = None,
) -> Iterator[tuple[World, Any]]:
    """This rank's chunk of the model, weights unset."""
    platform = choose("cpu").platform()
    run = RunConfig(
        model=ModelConfig(foundation=ComponentConfig(family="tiny", geometry=geometry)),
        train=TrainConfig(train_iters=1, seq_length=LENGTH, precision="fp32"),
        parallel=parallel or ParallelConfig(),
        moe=moe or ExpertConfig(),
    )
    with join(where, worker, platform, 1.0) as world:
        model_parallel_cuda_manual_seed(1)
        layers = layers_for(platform, torch.float32)
        config = transformer_config(geometry, run, where, layers, initialise=True)
        context = BuildContext(
            config=config, groups=world.groups, layers=layers, padded_vocab_size=geometry.vocab_size, seq_length=LENGTH,
            pre_process=world.is_first_stage, post_process=world.is_last_stage, vp_stage=None,
        )  # fmt: skip
        yield world, LanguageModel(geometry, context)


def load(chunk: Any, world: World, weights: dict[str, torch.Tensor]) -> Place:
    """Fill every parameter and the expert biases."""
    groups = world.groups
    place = Place(
        tp=groups.tp.size(), tp_rank=groups.tp.rank(), etp=groups.expt_tp.size(), etp_rank=groups.expt_tp.rank()
    )
    with torch.no_grad():
        for name, parameter in whole_model_names([chunk]).items():
            parameter.copy_(part(name, weights[name], place))
        for name, buffer in expert_biases(chunk).items():
            buffer.copy_(weights[name])
    return place


def expert_biases(chunk: Any) -> dict[str, torch.Tensor]:
    """The routers' biases by whole-model name."""
    return {
        whole_model_name(chunk, name): buffer
        for name, buffer in chunk.named_buffers()
        if name.endswith("router.expert_bias")
    }


def wrap(world: World, chunk: Any, **options: Any) -> Any:
    """Gradient buckets around a chunk, and the end of a step."""
    wrapped: Any = DistributedDataParallel(
        chunk.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, **options), chunk,
        pg_collection=world.groups,
    )  # fmt: skip
    chunk.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def step(world: World, wrapped: Any, *, packed: bool = False, micro_batch: int = 1) -> float:
    """All micro-batches forward and backward; the mean loss where this rank knows it."""
    data = batch()
    mine = {name: one.chunk(world.layout.dp)[world.dp.rank()] for name, one in data.items()}
    rows = [
        {name: one[n : n + micro_batch] for name, one in mine.items()}
        for n in range(0, len(mine["tokens"]), micro_batch)
    ]
    if packed:  # two sequences in a row
        rows = [
            {name: torch.cat([one[name] for one in rows[n : n + 2]], 1) for name in mine}
            for n in range(0, len(rows), 2)
        ]
    length = rows[0]["tokens"].size(1)
    boundaries = (0, LENGTH, 2 * LENGTH) if packed else (0, length)
    index = local_indices(boundaries, world.cp.rank(), world.cp.size()) if world.cp.size() > 1 else torch.arange(length)
    row_of = PackedRow.of(boundaries, torch.device("cpu")) if packed else None

    def forward(source: Any, model: Any) -> Any:
        row = {name: one[:, index] for name, one in next(source).items()}
        positions = (index % LENGTH).expand(len(row["tokens"]), -1)
        losses = model(
            row["tokens"], position_ids=positions, labels=row["labels"], packed=row_of, loss_mask=row["loss_mask"]
        )

        def finish(losses: torch.Tensor) -> Any:
            total = (losses * row["loss_mask"]).sum()
            return total, row["loss_mask"].sum().to(torch.int), total.detach()

        return losses, finish

    wrapped.zero_grad_buffer()
    sums = get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iter(rows), model=wrapped, num_microbatches=len(rows),
        seq_length=length, micro_batch_size=micro_batch, forward_only=False,
    )  # fmt: skip
    if not world.is_last_stage:
        return 0.0
    total = torch.stack(sums).sum()
    torch.distributed.all_reduce(total, group=world.dp_cp)
    return float(total / data["loss_mask"].sum())


def measure(
    geometry: TransformerGeometry,
    where: Layout,
    worker: Worker,
    weights: dict[str, torch.Tensor],
    *,
    packed: bool = False,
    parallel: ParallelConfig | None = None,
    moe: ExpertConfig | None = None,
    micro_batch: int = 1,
    training: bool = False,
) -> Measured:
    """One step's loss and gradients of this rank; `training` with what only training has (aux loss, bias update)."""
    with chunk_of(geometry, where, worker, parallel, moe) as (world, chunk):
        place = load(chunk, world, weights)
        alone = world.size == 1
        with torch.no_grad():
            chunk.eval()
            logits = chunk(batch()["tokens"], position_ids=torch.arange(LENGTH)[None]) if alone else None
        wrapped = wrap(world, chunk).train(training)
        weigh_layer_losses(chunk.config, int(batch()["loss_mask"].sum()), SAMPLES * LENGTH)
        loss = step(world, wrapped, packed=packed, micro_batch=micro_batch)
        z_loss = moe is not None and moe.moe_z_loss_coeff > 0
        numbers = take_expert_numbers([chunk], geometry, world, SAMPLES // micro_batch // where.dp, z_loss=z_loss)
        named = whole_model_names([chunk])
        gradients = {name: vars(one)["main_grad"].clone() for name, one in named.items()}
        marked = tuple(name for name, one in named.items() if not getattr(one, "allreduce", True))
        return Measured(
            place=place, loss=loss, gradients=gradients, logits=logits, buffers=expert_biases(chunk),
            balance=numbers.balance_loss, z_loss=numbers.z_loss, loads=numbers.loads, expert_names=marked,
        )  # fmt: skip


def worst(found: list[Measured], whole: Measured) -> tuple[float, str]:
    """Largest difference of a gradient on any rank, relative to the largest entry of the whole one, and its name.

    A gradient smaller than 1e-4 of the model's largest is measured on that scale: beneath it is rounding.
    """
    floor = 1e-4 * max(float(one.abs().max()) for one in whole.gradients.values())
    differences: list[tuple[float, str]] = []
    seen: set[str] = set()
    for rank in found:
        seen |= rank.gradients.keys()
        for name, one in rank.gradients.items():
            other = whole.gradients[name]
            scale = max(floor, float(other.abs().max()))
            mine = part(name, other, rank.place)
            assert one.shape == mine.shape, name
            differences.append((float((one - mine).abs().max()) / scale, name))
    assert seen == whole.gradients.keys() - {name for name in whole.gradients if name.endswith("expert_bias")}
    return max(differences)
