"""Adapters: which can be trained in a layout, and what one rank of each pipeline stage holds of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loongforge.core.lora.targets import Adapter, problems
from loongforge.core.plan.candidate import Candidate
from loongforge.core.plan.parameters import Held
from loongforge.core.plan.stages import stage_chunks

if TYPE_CHECKING:
    from loongforge.core.plan.plan import Plan


def lora_rules(candidate: Candidate) -> Iterator[str]:
    """What a run with adapters cannot be."""
    config, section = candidate.config, candidate.config.lora
    if candidate.matrices is None:
        if section.adapter_path is not None:
            yield f"lora.adapter_path={section.adapter_path!r} was not read: give it with the flag or in the YAML."
        return
    yield from problems(section, candidate.matrices, candidate.layout.tp)
    chosen = candidate.adapters
    if any(one.dropout > 0 and one.matrix.experts is not None for one in chosen) and candidate.layout.etp > 1:
        yield (
            f"lora.dropout in experts that expert_tensor_parallel_size={candidate.layout.etp} splits would differ "
            "between the ranks of one expert: use --expert-tensor-parallel-size 1, or a pattern with dropout=0."
        )
    towers = [one for one in chosen if one.matrix.component != "foundation" and one.dropout > 0]
    if towers and candidate.encoder is not None and candidate.encoder.tp > 1:
        yield (
            f"lora.dropout in an image encoder that tensor_model_parallel_size={candidate.encoder.tp} splits would "
            "differ between the ranks of one image: use +model.image_encoder.tensor-model-parallel-size=1, or a "
            "pattern with dropout=0."
        )
    if config.moe.moe_shared_expert_overlap and any(".shared_experts." in one.matrix.linear for one in chosen):
        yield (
            "lora: the shared expert with moe_shared_expert_overlap=True moves its tokens itself, past an adapter: "
            "turn the overlap off, or leave the shared expert out of lora.target_modules."
        )


def stage_adapters(plan: Plan) -> tuple[Held, ...]:
    """Parameters of the foundation's adapters that one rank of each pipeline stage holds, in stage order."""
    layout = plan.layout
    stages: list[Held] = []
    for stage in range(layout.pp):
        layers = {number for chunk in stage_chunks(plan.geometry.num_layers, layout, stage) for number in chunk}
        if stage == layout.pp - 1:
            layers |= {plan.geometry.num_layers + depth for depth in range(plan.geometry.prediction_layers)}
        dense = experts = 0
        for one in plan.adapters_in("foundation"):
            matrix = one.matrix
            if matrix.layer not in layers:
                continue
            size = _part(one, layout.tp if matrix.experts is None else layout.etp)
            dense += size if matrix.experts is None else 0
            experts += size * (matrix.experts or 0) // layout.ep
        stages.append(Held(dense=dense, experts=experts))
    return tuple(stages)


def tower_adapters(plan: Plan, component: str) -> int:
    """Parameters of adapters that one rank of the encoder's grid holds in an encoder or a projector."""
    assert plan.encoder is not None, "asked of models with an encoder only"
    return sum(_part(one, plan.encoder.tp) for one in plan.adapters_in(component))


def _part(adapter: Adapter, parts: int) -> int:
    """Parameters of one adapter on one of `parts` ranks that share the matrix."""
    matrix = adapter.matrix
    inputs = matrix.inputs // (parts if matrix.split == "columns" else 1)
    outputs = matrix.outputs // (parts if matrix.split == "rows" else 1)
    return adapter.rank * (inputs + outputs)


def adapter_parameters(plan: Plan) -> int:
    """Parameters of all adapters of the model, once."""
    return sum(one.rank * (one.matrix.inputs + one.matrix.outputs) * (one.matrix.experts or 1) for one in plan.adapters)
