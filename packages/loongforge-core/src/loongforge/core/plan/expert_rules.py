"""What mixtures of experts and latent attention ask of a layout, beyond what every decoder does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from loongforge.core.config.experts import ExpertConfig
from loongforge.core.model.geometry import TransformerGeometry
from loongforge.core.plan.candidate import Candidate, divisors


def recomputable(geometry: TransformerGeometry) -> tuple[str, ...]:
    """Modules of a decoder that megatron-core can recompute one by one, without TransformerEngine."""
    experts = geometry.experts
    modules = ["core_attn", "layernorm"]
    if experts is None or experts.first_dense_layers:
        modules.append("mlp")
    if experts is not None:
        modules += ["moe"] + ["shared_experts"] * (experts.shared_ffn_hidden_size is not None)
    if geometry.latent is not None:
        modules.append("mla_up_proj")
    return tuple(modules)


def prediction_rules(candidate: Candidate) -> Iterator[str]:
    """What further layers of multi-token prediction do without."""
    geometry, parallel = candidate.geometry, candidate.config.parallel
    if not geometry.prediction_layers:
        return
    if candidate.encoder_geometry is not None:
        yield (
            f"mtp_num_layers={geometry.prediction_layers} with an image encoder: the further layers embed tokens and "
            "would not see images; set mtp_num_layers to 0."
        )
    count = parallel.recompute_num_layers
    if parallel.recompute_granularity == "full" and parallel.recompute_method == "uniform" and count not in (None, 1):
        yield (
            f"parallel.recompute_num_layers={count} with mtp_num_layers={geometry.prediction_layers}: megatron-core "
            "recomputes further layers one by one, use --recompute-num-layers 1 or --recompute-method block."
        )


def latent_rules(candidate: Candidate) -> Iterator[str]:
    """megatron-core sums the gradient of the query norm over tensor parallel ranks that each hold all of it already."""
    layout = candidate.layout
    if candidate.geometry.latent is not None and layout.tp > 1 and not layout.sp:
        yield (
            f"latent attention with tensor_model_parallel_size={layout.tp} gets wrong gradients without "
            "sequence_parallel: turn it on."
        )


def expert_rules(candidate: Candidate) -> Iterator[str]:
    """Sizes of the expert axes."""
    if candidate.geometry.experts is None:
        yield from _dense(candidate)
    else:
        yield from _axes(candidate)
        yield from _sizes(candidate)
        yield from _capacity(candidate)
        yield from _overlap(candidate)


def _dense(candidate: Candidate) -> Iterator[str]:
    parallel = candidate.config.parallel
    if parallel.expert_model_parallel_size > 1:
        yield (
            f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} needs experts, but the model "
            "is dense: set it to 1."
        )
    etp, tp = parallel.expert_tensor_parallel_size, parallel.tensor_model_parallel_size
    if etp is not None and etp != tp:
        yield (
            f"parallel.expert_tensor_parallel_size={etp} differs from tensor_model_parallel_size={tp}, but the model "
            "has no experts: leave it out."
        )
    section, plain = candidate.config.moe, ExpertConfig()
    given = [one.name for one in fields(section) if getattr(section, one.name) != getattr(plain, one.name)]
    if given:
        yield f"moe.{given[0]}={getattr(section, given[0])!r} needs experts, but the model is dense: leave it out."


def _axes(candidate: Candidate) -> Iterator[str]:
    layout = candidate.layout
    stage = layout.tp * layout.cp * layout.dp
    if layout.etp not in (1, layout.tp):
        yield (
            f"parallel.expert_tensor_parallel_size={layout.etp} is neither 1 nor tensor_model_parallel_size="
            f"{layout.tp}: use one of the two."
        )
    elif stage % (layout.ep * layout.etp):
        assert candidate.geometry.experts is not None, "asked of mixtures of experts only"
        sizes = divisors(candidate.geometry.experts.num_experts)
        legal = [size for size in sizes if stage % (size * layout.etp) == 0]
        yield (
            f"parallel.expert_model_parallel_size={layout.ep} x expert_tensor_parallel_size={layout.etp} does not "
            f"divide the {stage} ranks of a pipeline stage: use an expert_model_parallel_size among {legal}"
            + (", or --expert-tensor-parallel-size 1." if layout.etp > 1 else ".")
        )
    if layout.tp > 1 and not layout.sp:
        yield (
            f"experts with tensor_model_parallel_size={layout.tp} need sequence_parallel (megatron-core refuses to "
            "route the same tokens on every tensor parallel rank): turn it on."
        )


def _sizes(candidate: Candidate) -> Iterator[str]:
    geometry, layout, experts = candidate.geometry, candidate.layout, candidate.geometry.experts
    assert experts is not None, "asked of mixtures of experts only"
    if experts.num_experts % layout.ep:
        yield (
            f"parallel.expert_model_parallel_size={layout.ep} does not divide num_experts={experts.num_experts}: "
            f"use {divisors(experts.num_experts)}."
        )
    if experts.ffn_hidden_size % layout.etp:
        yield (
            f"parallel.expert_tensor_parallel_size={layout.etp} does not divide an expert's ffn_hidden_size="
            f"{experts.ffn_hidden_size}: use --expert-tensor-parallel-size 1."
        )
    if (experts.shared_ffn_hidden_size or 0) % layout.tp:
        yield (
            f"parallel.tensor_model_parallel_size={layout.tp} does not divide shared_ffn_hidden_size="
            f"{experts.shared_ffn_hidden_size}: use a tensor parallel size that does."
        )
    if experts.first_dense_layers > geometry.num_layers:
        yield (
            f"model.foundation: first_dense_layers={experts.first_dense_layers} is more than num_layers="
            f"{geometry.num_layers}: lower it."
        )


def _capacity(candidate: Candidate) -> Iterator[str]:
    section, experts = candidate.config.moe, candidate.geometry.experts
    assert experts is not None, "asked of mixtures of experts only"
    factor, pads = section.moe_expert_capacity_factor, section.moe_pad_expert_input_to_capacity
    if factor is None and section.moe_token_drop_policy != "probs":
        yield (
            f"moe.moe_token_drop_policy={section.moe_token_drop_policy!r} drops nothing without a capacity: give "
            "moe_expert_capacity_factor, or leave it out."
        )
    if factor is None and pads:
        yield "moe.moe_pad_expert_input_to_capacity=True needs a moe_expert_capacity_factor: give one, for example 1.0."
    elif pads and section.moe_token_dispatcher_type == "allgather":
        yield "moe.moe_pad_expert_input_to_capacity=True goes with moe_token_dispatcher_type='alltoall': use that one."
    if factor is not None and pads and factor * experts.topk > experts.num_experts:
        yield (
            f"moe.moe_expert_capacity_factor={factor} pads an expert's input to more tokens than there are: use at "
            f"most num_experts / topk = {experts.num_experts / experts.topk:g}, where nothing is dropped any more."
        )


def _overlap(candidate: Candidate) -> Iterator[str]:
    section, experts, parallel = candidate.config.moe, candidate.geometry.experts, candidate.config.parallel
    assert experts is not None, "asked of mixtures of experts only"
    if not section.moe_shared_expert_overlap:
        return
    if experts.shared_ffn_hidden_size is None:
        yield "moe.moe_shared_expert_overlap=True needs a shared expert, which this model lacks: leave it out."
    elif section.moe_token_dispatcher_type == "allgather":
        yield "moe.moe_shared_expert_overlap=True goes with moe_token_dispatcher_type='alltoall': use that one."
    if parallel.recompute_granularity == "selective" and "shared_experts" in parallel.recompute_modules:
        yield (
            "moe.moe_shared_expert_overlap=True cannot recompute the shared expert by itself: take shared_experts out "
            "of recompute_modules, or drop the overlap."
        )
