"""The plan in numbers, as plain data for `--json` and for the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from loongforge.core.plan.compute import encoder_flops_per_step, flops_per_step, flops_per_token, pipeline_bubble
from loongforge.core.plan.encoder_memory import encoder_memory, fullest_rank, projector_memory, tower_parameters
from loongforge.core.plan.images import ImageBudget
from loongforge.core.plan.index import route_line, warms_up
from loongforge.core.plan.layout import EncoderMode
from loongforge.core.plan.lora import adapter_parameters
from loongforge.core.plan.memory import Memory, stage_memory, stage_trained, stays
from loongforge.core.plan.modes import Advice, ModeForecast, advise, forecasts
from loongforge.core.plan.parameters import count_parameters, stage_parameters
from loongforge.core.plan.plan import Plan
from loongforge.core.plan.traffic import Traffic, traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentReport:
    """One part of the model on its ranks."""

    name: str
    family: str
    axes: dict[str, int]
    """Sizes of tp, cp, dp, pp, vpp, ep, and of etp where there are experts."""
    mode: EncoderMode | None = None
    """Where an encoder or projector runs; None for the foundation."""
    sequence_parallel: bool
    trains: bool
    parameters: int
    parameters_per_rank: tuple[int, ...]
    """By pipeline stage."""
    memory: tuple[Memory, ...]
    """Bytes per rank by pipeline stage."""

    @property
    def peak(self) -> Memory:
        """The stage that needs most."""
        return max(self.memory, key=lambda stage: stage.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything `loongforge plan` prints."""

    world: int
    components: tuple[ComponentReport, ...]
    global_batch_size: int
    micro_batch_size: int
    num_microbatches: int
    seq_length: int
    train_iters: int
    tokens_per_step: int
    tokens: int
    """Tokens of the whole run."""
    padded_vocab_size: int
    pipeline_bubble: float
    """Idle time relative to the time in work."""
    traffic: Traffic
    flops_per_token: int
    flops_per_step: int
    encoder_flops_per_step: int
    """Model FLOPs of encoder and projector on the images assumed; 0 without an encoder."""
    images: str | None
    """What is assumed of images wherever a number depends on them; None without an encoder."""
    modes: tuple[ModeForecast, ...]
    """The encoder in each of its places; empty without one."""
    advice: Advice | None
    """The place to choose."""
    peak_bytes: int
    """Bytes of the fullest rank."""
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data; bytes and FLOPs are whole numbers."""
        data = asdict(self)
        for component, plain in zip(self.components, data["components"], strict=True):
            plain["memory"] = [asdict(stage) | {"total": stage.total} for stage in component.memory]
            plain["peak"] = asdict(component.peak) | {"total": component.peak.total}
        data["traffic"]["total"] = self.traffic.total
        data["flops_per_step_and_rank"] = self.flops_per_step // self.world
        return data


def report(plan: Plan, device_bytes: int | None = None) -> Report:
    """All numbers of a plan; what is advised fits into `device_bytes` per rank when that is given."""
    layout, modes = plan.layout, forecasts(plan)
    return Report(
        world=plan.world,
        components=(*_tower(plan), _foundation(plan)),
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        num_microbatches=plan.num_microbatches,
        seq_length=plan.seq_length,
        train_iters=plan.train_iters,
        tokens_per_step=plan.tokens_per_step,
        tokens=plan.tokens_per_step * plan.train_iters,
        padded_vocab_size=plan.padded_vocab_size,
        pipeline_bubble=pipeline_bubble(plan),
        traffic=traffic(plan),
        flops_per_token=flops_per_token(plan),
        flops_per_step=flops_per_step(plan),
        encoder_flops_per_step=encoder_flops_per_step(plan),
        images=str(ImageBudget.of(plan)) if plan.encoder else None,
        modes=modes,
        advice=advise(modes, layout.tp * layout.cp * layout.pp, device_bytes),
        peak_bytes=fullest_rank(plan),
        notes=tuple(_notes(plan)),
    )


def _foundation(plan: Plan) -> ComponentReport:
    layout, foundation = plan.layout, plan.config.model.foundation
    axes = {
        "tp": layout.tp, "cp": layout.cp, "dp": layout.dp, "pp": layout.pp, "vpp": layout.num_chunks, "ep": layout.ep,
    }  # fmt: skip
    if plan.geometry.experts is not None:
        axes["etp"] = layout.etp
    return ComponentReport(
        name="foundation",
        family=foundation.family,
        axes=axes,
        sequence_parallel=layout.sp,
        trains=not stays(plan),
        parameters=count_parameters(plan.geometry, plan.padded_vocab_size),
        parameters_per_rank=stage_parameters(plan.geometry, plan.padded_vocab_size, layout),
        memory=stage_memory(plan),
    )


def _tower(plan: Plan) -> Iterator[ComponentReport]:
    """Encoder and projector: one stage each, on the encoder's grid."""
    memories = {"image_encoder": encoder_memory, "image_projector": projector_memory}
    for name, (whole, held) in tower_parameters(plan).items():
        assert plan.encoder is not None, "an encoder has a layout"
        component = plan.config.model.components[name]
        yield ComponentReport(
            name=name,
            family=component.family,
            axes={"tp": plan.encoder.tp, "cp": 1, "dp": plan.encoder.dp, "pp": 1, "vpp": 1, "ep": 1},
            mode=plan.encoder.mode,
            sequence_parallel=False,
            trains=plan.trains(name),
            parameters=whole,
            parameters_per_rank=(held,),
            memory=(memories[name](plan),),
        )


def _notes(plan: Plan) -> list[str]:
    """What a user should know and may well want as it is."""
    notes: list[str] = []
    longest = plan.geometry.max_position_embeddings
    if plan.seq_length > longest:
        notes.append(f"seq_length={plan.seq_length} is more than the {longest} positions the model was made for.")
    if plan.adapters:
        modules = sum(one.matrix.experts or 1 for one in plan.adapters)
        notes.append(
            f"adapters on {modules:,} modules train, {adapter_parameters(plan):,} parameters; the model is frozen, "
            "it has no gradients and no optimizer state."
        )
    if (line := route_line(plan)) is not None:
        notes.append(line)
    if warms_up(plan.geometry):
        trained = sum(held.total for held in stage_trained(plan))
        notes.append(f"the indexers alone train, {trained:,} parameters; activations are counted as if all did.")
    if plan.config.model.freeze_parameters:
        notes.append("freeze_parameters is not known here: gradients and optimizer count every parameter.")
    if plan.geometry.experts is not None and plan.layout.etp > 1:
        notes.append(
            f"expert_tensor_parallel_size={plan.layout.etp} (as tensor_model_parallel_size when unset) hands every "
            f"token to {plan.layout.etp} ranks: --expert-tensor-parallel-size 1 with a larger "
            "expert_model_parallel_size keeps fewer activations."
        )
    notes += _expert_notes(plan)
    samples, batch = plan.config.train.train_samples, plan.global_batch_size
    if samples and samples % batch:
        notes.append(
            f"the last {samples % batch} of train_samples={samples} do not fill a global batch and are left out."
        )
    if plan.layout.dp * plan.layout.cp > 1 and not plan.config.parallel.use_distributed_optimizer:
        peak = max(stage_memory(plan), key=lambda stage: stage.total).optimizer
        saved = peak - peak // (plan.layout.dp * plan.layout.cp)
        if saved:
            notes.append(f"use_distributed_optimizer would save {saved / 2**30:.2f} GiB of optimizer state per rank.")
    return notes


def _expert_notes(plan: Plan) -> list[str]:
    """How tokens reach their experts, and what a capacity does to an even load."""
    section, experts, layout = plan.config.moe, plan.geometry.experts, plan.layout
    if experts is None:
        return []
    notes: list[str] = []
    if layout.ep > 1:
        asked = section.moe_token_dispatcher_type or "alltoall"
        notes.append(f"tokens reach their experts by {asked} over ep={layout.ep} ranks, counted for an even load.")
    if (factor := section.moe_expert_capacity_factor) is not None:
        tokens = plan.micro_batch_size * plan.seq_length // layout.cp // layout.tp
        capacity = ceil(tokens * experts.topk / experts.num_experts * factor)
        notes.append(
            f"moe_expert_capacity_factor={factor:g}: an expert takes at most {capacity} of the {tokens} tokens that a "
            "rank has of a micro-batch, and what is beyond is dropped."
        )
    return notes
