"""Bytes that a rank needs for an encoder and its projector, at the images of `images.ImageBudget`."""

from __future__ import annotations

from loongforge.core.config.run import ComponentConfig
from loongforge.core.plan.images import ImageBudget
from loongforge.core.plan.layout import EncoderLayout
from loongforge.core.plan.lora import tower_adapters
from loongforge.core.plan.memory import (
    Memory,
    chunks_in_flight,
    element_bytes,
    gradient_bytes,
    optimizer_bytes,
    stage_memory,
)
from loongforge.core.plan.plan import Plan
from loongforge.core.plan.towers import encoder_elements, held, projector_elements


def encoder_memory(plan: Plan) -> Memory:
    """The encoder on one of its ranks, features of the step's micro-batches in flight included."""
    component, geometry = plan.config.model.image_encoder, plan.encoder_geometry
    assert component is not None, "asked of models with an encoder only"
    assert geometry is not None, "an encoder has a shape"
    return _memory(plan, component, encoder_elements(geometry).total, _encoder_activations(plan, component))


def projector_memory(plan: Plan) -> Memory:
    """The projector on one of its ranks; on the first stage's with the features that wait for the pipeline."""
    component, geometry = plan.config.model.image_projector, plan.projector_geometry
    assert component is not None, "asked of models with a projector only"
    assert geometry is not None, "a projector has a shape"
    assert plan.encoder_geometry is not None, "a projector follows an encoder"
    total = projector_elements(geometry, plan.encoder_geometry).total
    return _memory(plan, component, total, _projector_activations(plan) + waiting_bytes(plan))


def tower_parameters(plan: Plan) -> dict[str, tuple[int, int]]:
    """Parameters of the image encoder and of the projector: in all, and on one rank."""
    found: dict[str, tuple[int, int]] = {}
    if plan.encoder is None or plan.encoder_geometry is None:
        return found
    elements = {"image_encoder": encoder_elements(plan.encoder_geometry)}
    if plan.projector_geometry is not None:
        elements["image_projector"] = projector_elements(plan.projector_geometry, plan.encoder_geometry)
    return {name: (one.total, held(one, plan.encoder.tp)) for name, one in elements.items()}


def fullest_rank(plan: Plan) -> int:
    """Bytes of the rank that needs most: of one stage, or of a stage and the encoder on it, or of the encoder apart."""
    stages = [stage.total for stage in stage_memory(plan)]
    if plan.encoder is None:
        return max(stages)
    tower = encoder_memory(plan).total
    if plan.projector_geometry is not None:
        tower += projector_memory(plan).total
    if plan.encoder.mode == "apart":
        return max(tower, *stages)
    others = tower - waiting_bytes(plan) if plan.encoder.mode == "ahead" else 0
    return max([stages[0] + tower, *(stage + others for stage in stages[1:])])


def _memory(plan: Plan, component: ComponentConfig, total: int, activations: int) -> Memory:
    name = "image_encoder" if component is plan.config.model.image_encoder else "image_projector"
    parameters, adapters = tower_parameters(plan)[name][1], tower_adapters(plan, name)
    trained, frozen = adapters if plan.adapters else parameters, not plan.trains(name)
    return Memory(
        weights=(parameters + adapters) * element_bytes(plan),
        gradients=trained * gradient_bytes(plan, frozen=frozen),
        optimizer=optimizer_bytes(plan, trained, _layout(plan).dp, frozen=frozen),
        activations=activations,
    )


def features_in_flight(plan: Plan) -> float:
    """Features whose way through the encoder one of its ranks remembers for the backward pass.

    Inline: those of the micro-batches that the first chunk of the first stage has in flight. Ahead: the whole step's.
    Apart: one micro-batch more than the pipeline's first stage.
    """
    encoder, layout, images = _layout(plan), plan.layout, ImageBudget.of(plan)
    per_microbatch = plan.micro_batch_size * images.images * images.features * layout.dp / encoder.dp
    if encoder.mode == "ahead":
        return per_microbatch * plan.num_microbatches
    if encoder.mode == "apart":
        return per_microbatch * min(plan.num_microbatches, layout.pp + 1)
    rounds, rest = divmod(chunks_in_flight(plan, 0), layout.pp * layout.num_chunks)
    return per_microbatch * (rounds * layout.pp + min(rest, layout.pp))


def waiting_bytes(plan: Plan) -> int:
    """Features that wait on the device of a rank of the first stage, and their gradients.

    Only ahead of the pipeline do they wait, micro-batch m on stage m % pp; on later stages, and on the first one with
    full_hetero_dp_cpu_offload, in host memory.
    """
    layout, parallel = plan.layout, plan.config.parallel
    if _layout(plan).mode != "ahead" or parallel.full_hetero_dp_cpu_offload:
        return 0
    images = ImageBudget.of(plan)
    waiting = -(-plan.num_microbatches // layout.pp)
    features = waiting * plan.micro_batch_size * images.images * images.features
    kept = 2 if _trains(plan) else 1
    return round(kept * features / (layout.tp * layout.cp) * _row_elements(plan)) * element_bytes(plan)


def _layout(plan: Plan) -> EncoderLayout:
    assert plan.encoder is not None, "asked of models with an encoder only"
    return plan.encoder


def _trains(plan: Plan) -> bool:
    """Whether gradients come back to the features."""
    return any(plan.trains(name) for name in plan.config.model.components if name != "foundation")


def _row_elements(plan: Plan) -> int:
    assert plan.encoder_geometry is not None, "asked of models with an encoder only"
    return (1 + plan.encoder_geometry.levels) * plan.geometry.hidden_size


def _encoder_activations(plan: Plan, component: ComponentConfig) -> int:
    """Per patch and layer, in elements: 4h (inputs and outputs of two norms), and divided by the encoder's tp: fused
    QKV, rotated queries and keys, attention's output before and after its transpose, and the MLP's inner widths.

    A frozen encoder keeps nothing: one layer of the images of one micro-batch is in work.
    """
    geometry, tp, parallel = plan.encoder_geometry, _layout(plan).tp, component.parallel
    assert geometry is not None, "an encoder has a shape"
    hidden, wide = geometry.hidden_size, (4 if geometry.gated else 2) * geometry.ffn_hidden_size
    dropped: tuple[str, ...] = ()
    if parallel.recompute_granularity == "selective":
        dropped = ("core_attn",) if parallel.recompute_modules is None else parallel.recompute_modules
    norms = (2 if "layernorm" in dropped else 4) * hidden
    layer = norms + 7 * hidden / tp + (0 if "mlp" in dropped else wide / tp)
    kept: float = geometry.num_layers * layer
    working: float = 0
    if parallel.recompute_granularity == "full":
        group = min(parallel.recompute_num_layers or 1, geometry.num_layers)
        if parallel.recompute_method == "block":
            kept, working = group * hidden + (geometry.num_layers - group) * layer, layer
        else:
            kept, working = -(-geometry.num_layers // group) * hidden, group * layer
    if not plan.trains("image_encoder"):
        kept, working = 0, layer
    flight, images = features_in_flight(plan), ImageBudget.of(plan)
    at_work = plan.micro_batch_size * images.images * images.features * plan.layout.dp / _layout(plan).dp
    if _layout(plan).mode == "ahead":
        at_work = flight
    patches = geometry.spatial_merge_size**2
    return round(patches * (flight * kept + at_work * working)) * element_bytes(plan)


def _projector_activations(plan: Plan) -> int:
    """Per feature and level: the normalised input, the first layer's output and its GELU (divided by tp), and the row
    that leaves. The last hidden states are kept besides; those of deepstack levels are layer inputs, counted there."""
    geometry, encoder = plan.projector_geometry, plan.encoder_geometry
    assert geometry is not None, "a projector has a shape"
    assert encoder is not None, "a projector follows an encoder"
    if not _trains(plan):
        return 0
    merged = (geometry.input_size or 0) * encoder.spatial_merge_size**2
    level = merged + 2 * merged / _layout(plan).tp
    each = merged + (1 + encoder.levels) * level + _row_elements(plan)
    return round(features_in_flight(plan) * each) * element_bytes(plan)
