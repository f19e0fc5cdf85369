"""Run `LanguageModel` on the sequences of a `Truth`, in any layout, and measure how far it is from it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from towers import Sequence, Truth, part_of

from loongforge.core.config.run import ComponentConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from loongforge.core.megatron.context_parallel import local_indices
from loongforge.core.plan.layout import Layout
from loongforge.core.testing import run_distributed


@dataclass(frozen=True, kw_only=True)
class Distance:
    """From transformers, fp32: the loss relative, a tensor relative to its largest entry."""

    loss: float
    logits: float
    grads: float
    grads_where: str
    rows: float
    bits: tuple[float, ...]
    """Sum of each gradient, rows last, to compare runs of ours to the last bit."""

    def within(self, limit: float) -> None:
        """Fail with what is farther."""
        assert max(self.loss, self.logits, self.grads, self.rows) <= limit, self


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of ours."""

    truth: str
    """Name of the truth among those of the test."""
    parallel: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ParallelConfig`."""
    packed: bool = False
    """The sequences are segments of one row, otherwise rows of one batch."""
    frozen_embedding: bool = False
    one_by_one: bool = False
    """A micro-batch for each sequence, otherwise one for all."""


def measure(make: Callable[[], dict[str, Truth]], cases: Mapping[str, Case]) -> dict[str, Distance | str]:
    """Every case in processes of its own; the text of its failure in place of the distance where it failed.

    megatron-core and transformers are imported in a process that ends with the call.
    """
    (found,) = run_distributed(partial(_measure, make=make, cases=cases), 1, timeout=300.0)
    return found


def distance(found: Mapping[str, Distance | str], name: str) -> Distance:
    """The distance of a case; its failure fails the test."""
    one = found[name]
    assert isinstance(one, Distance), one
    return one


def _measure(worker: Any, make: Callable[[], dict[str, Truth]], cases: Mapping[str, Case]) -> dict[str, Any]:
    import warnings

    warnings.simplefilter("ignore")  # upstream's own, at import
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform import choose

    truths = make()
    start_megatron(choose("cpu").platform())
    warnings.simplefilter("error")
    found: dict[str, Any] = {}
    for name, case in cases.items():
        config = ParallelConfig(**case.parallel)
        world = config.tensor_model_parallel_size * config.context_parallel_size * config.pipeline_model_parallel_size
        try:
            ranks = run_distributed(partial(_run, case=case, parallel=config, truth=truths[case.truth]), world)
            found[name] = _worst(ranks)
        except AssertionError:
            found[name] = traceback.format_exc()
    return found


def _worst(ranks: list[Distance]) -> Distance:
    farthest = max(ranks, key=lambda one: one.grads)
    return Distance(
        loss=max(one.loss for one in ranks), logits=max(one.logits for one in ranks), grads=farthest.grads,
        grads_where=farthest.grads_where, rows=max(one.rows for one in ranks), bits=ranks[0].bits,
    )  # fmt: skip


def _run(worker: Any, case: Case, parallel: ParallelConfig, truth: Truth) -> Distance:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from loongforge.core.megatron.groups import join
    from loongforge.core.platform import choose

    layout = Layout.of(parallel, worker.world_size)
    with join(layout, worker, choose("cpu").platform(), 1.0) as world:
        model_parallel_cuda_manual_seed(3)
        chunks = _build(truth, parallel, world)
        model = torch.nn.ModuleList(chunks)
        if case.frozen_embedding:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("embedding" not in name)
        feeds = [[one] for one in truth.sequences] if case.one_by_one else [truth.sequences]
        batches = [_Batch(feed, case.packed, truth, world) for feed in feeds]
        losses = _schedule(chunks, batches, world)
        return _compare(chunks, batches, losses, truth, world)


def _build(truth: Truth, parallel: ParallelConfig, world: Any) -> list[Any]:
    from loongforge.core.megatron.language_model import LanguageModel
    from loongforge.core.megatron.specs import layers_for
    from loongforge.core.megatron.transformer_config import transformer_config
    from loongforge.core.model.contract import BuildContext

    geometry, layout = truth.geometry, world.layout
    run = RunConfig(
        model=ModelConfig(foundation=ComponentConfig(family="test", geometry=None)),
        train=TrainConfig(train_iters=1, precision="fp32", seq_length=64), parallel=parallel,
    )  # fmt: skip
    layers = layers_for(world.platform, torch.float32)
    config = transformer_config(geometry, run, layout, layers, initialise=True)
    chunks: list[Any] = []
    for stage in range(layout.num_chunks):
        context = BuildContext(
            config=config, groups=world.groups, layers=layers, padded_vocab_size=geometry.vocab_size, seq_length=64,
            pre_process=world.is_first_stage and stage == 0,
            post_process=world.is_last_stage and stage == layout.num_chunks - 1,
            vp_stage=stage if layout.vpp else None, deepstack=truth.levels,
        )  # fmt: skip
        chunk = LanguageModel(geometry, context)
        with torch.no_grad():
            for name, tensor in _whole_names(chunk, part_of(truth.weights, geometry, world.tp.rank(), layout.tp)):
                chunk.get_parameter(name).copy_(tensor)
        chunks.append(chunk)
    return chunks


def _whole_names(chunk: Any, tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """This chunk's parameters, by their names here, with the tensors of the whole model."""
    numbers = {str(place): str(layer.layer_number - 1) for place, layer in enumerate(chunk.decoder.layers)}
    found: list[tuple[str, torch.Tensor]] = []
    for name, _ in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = numbers[parts[2]]
        found.append((name, tensors[".".join(parts)]))
    return found


class _Batch:
    """A micro-batch as one rank sees it, and where its features came from."""

    def __init__(self, sequences: list[Sequence], packed: bool, truth: Truth, world: Any) -> None:
        from loongforge.core.megatron.layers import PackedRow
        from loongforge.core.model.contract import Visual

        lengths = [len(one.tokens) for one in sequences]
        self.sequences, self.world, self.is_packed = sequences, world, packed
        joined = {name: self._join(name) for name in ("tokens", "labels", "loss_mask", "position_ids")}
        starts = torch.tensor([0, *lengths]).cumsum(0)
        boundaries = tuple(starts.tolist()) if packed else (0, lengths[0])
        self.packed = PackedRow.of(boundaries, torch.device("cpu")) if packed else None
        index = local_indices(boundaries, world.cp.rank(), world.cp.size())
        self.fields = {name: tensor[..., index] for name, tensor in joined.items()}
        # The place of every feature in this rank's hidden states [S, B], -1 where another rank holds it.
        rows, length = joined["tokens"].shape
        flat = torch.cat([one.places + start for one, start in zip(sequences, starts[:-1], strict=True)])
        row, place = (torch.zeros_like(flat), flat) if packed else (flat // length, flat % length)
        here = torch.full((length,), -1)
        if world.layout.sp:
            index = index.chunk(world.tp.size())[world.tp.rank()]
        here[index] = torch.arange(len(index))
        place = here[place]
        local = torch.where(place < 0, -1, place * rows + row)
        self.chosen = torch.argsort(local)[int((local < 0).sum()) :]
        features = torch.cat([one.rows for one in sequences])[self.chosen].requires_grad_()
        self.visual = Visual(rows=features, positions=local[self.chosen])

    def _join(self, name: str) -> torch.Tensor:
        parts = [getattr(one, name) for one in self.sequences]
        return torch.cat(parts, -1).unsqueeze(-2) if self.is_packed else torch.stack(parts, -2)


def _schedule(chunks: list[Any], batches: list[_Batch], world: Any) -> float:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    total = torch.zeros(1, dtype=torch.float64)

    def forward_step(feed: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
        batch = next(feed)
        fields = batch.fields
        visual = {"visual": batch.visual} if chunk is chunks[0] and world.is_first_stage else {}
        output = chunk(fields["tokens"], position_ids=fields["position_ids"], labels=fields["labels"],
                       packed=batch.packed, loss_mask=fields["loss_mask"], **visual)  # fmt: skip

        def loss(losses: torch.Tensor) -> Any:
            masked = (losses * fields["loss_mask"]).sum()
            total.add_(masked.detach())
            return masked, fields["loss_mask"].sum().int(), {}

        return output, loss

    many = world.layout.vpp is not None
    get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=[iter(batches) for _ in chunks] if many else iter(batches),
        model=chunks if many else chunks[0], num_microbatches=len(batches), forward_only=False,
        seq_length=batches[0].fields["tokens"].size(1) * world.cp.size(),
        micro_batch_size=batches[0].fields["tokens"].size(0),
    )  # fmt: skip
    dist.all_reduce(total, group=world.cp)
    return total.item()


def _compare(chunks: list[Any], batches: list[_Batch], loss: float, truth: Truth, world: Any) -> Distance:
    farthest, where, bits = 0.0, "", []
    expected = part_of(truth.grads, truth.geometry, world.tp.rank(), world.tp.size())
    floor = 1e-4 * max(float(one.abs().max()) for one in expected.values())
    for chunk in chunks:
        for name, right in _whole_names(chunk, expected):
            parameter = chunk.get_parameter(name)
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None, f"{name} has no gradient"
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=world.tp)
            dist.all_reduce(parameter.grad, group=world.cp)
            bits.append(parameter.grad.double().sum().item())
            gap = float((parameter.grad - right).abs().max()) / max(floor, float(right.abs().max()))
            farthest, where = max((farthest, where), (gap, name))
    rows = 0.0
    if world.is_first_stage:
        right = torch.cat(truth.row_grads)
        offset = 0
        for batch in batches:
            grad = batch.visual.rows.grad
            assert grad is not None, "features have no gradient: their encoder would not take part"
            bits.append(grad.double().sum().item())
            if len(grad):
                gap = (grad - right[offset + batch.chosen]).abs().max() / right.abs().max()
                rows = max(rows, float(gap))
            offset += sum(len(one.places) for one in batch.sequences)
    return Distance(
        loss=abs(loss / truth.loss - 1) if world.is_last_stage else 0.0, logits=_logits(chunks, batches, truth, world),
        grads=farthest, grads_where=where, rows=rows, bits=tuple(bits),
    )  # fmt: skip


def _logits(chunks: list[Any], batches: list[_Batch], truth: Truth, world: Any) -> float:
    """Of one process alone, in evaluation."""
    if world.size > 1:
        return 0.0
    found: list[torch.Tensor] = []
    with torch.no_grad():
        for batch in batches:
            logits = chunks[0].eval()(
                batch.fields["tokens"], position_ids=batch.fields["position_ids"], packed=batch.packed,
                visual=batch.visual,
            )  # fmt: skip
            found.append(logits.flatten(0, 1))
    ours, right = torch.cat(found), torch.cat(truth.logits)
    return float((ours - right).abs().max() / right.abs().max())
