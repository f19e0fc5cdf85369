"""Where an encoder can run beside a foundation."""

from __future__ import annotations

from collections.abc import Iterator

from loongforge.core.config.run import ComponentParallel
from loongforge.core.plan.candidate import Candidate, divisors
from loongforge.core.plan.layout import EncoderLayout, encoder_grid
from loongforge.core.plan.stages import stage_chunks

FLAGS = ("enable_encoder_hetero_dp", "enable_full_hetero_dp", "full_hetero_dp_cpu_offload", "encoder_ranks")
SLOTS = ("image_encoder", "image_projector")


def encoder_rules(candidate: Candidate) -> Iterator[str]:
    """Every problem of the encoder's layout."""
    encoder, layout, parallel = candidate.encoder, candidate.layout, candidate.config.parallel
    if encoder is None:
        for flag in FLAGS:
            if value := getattr(parallel, flag):
                yield f"parallel.{flag}={value} speaks of an encoder, but the model has none: leave it out."
        return
    yield from _flags(candidate)
    for slot in SLOTS:
        component = candidate.config.model.components.get(slot)
        if component is not None:
            yield from _only_images_are_spread(slot, component.parallel)
    if layout.world % (layout.tp * layout.pp * layout.cp) == 0 and layout.world > 0:
        yield from _grid(candidate, encoder)
        yield from _apart(candidate, encoder)
    yield from _same_layout(candidate, encoder)
    yield from _widths(candidate, encoder)
    yield from _deepstack(candidate)


def _flags(candidate: Candidate) -> Iterator[str]:
    parallel = candidate.config.parallel
    chosen = [flag for flag in (FLAGS[0], FLAGS[1], FLAGS[3]) if getattr(parallel, flag)]
    if len(chosen) > 1:
        yield f"parallel.{' and '.join(chosen)} place the encoder differently: choose one."
    if parallel.full_hetero_dp_cpu_offload and not parallel.enable_full_hetero_dp:
        yield (
            "parallel.full_hetero_dp_cpu_offload=True keeps features that wait for the pipeline, but only "
            "enable_full_hetero_dp lets them wait: turn it on, or drop the offload."
        )
    assert candidate.config.model.image_encoder is not None, "asked of models with an encoder only"
    stated = candidate.config.model.image_encoder.parallel.tensor_model_parallel_size
    if parallel.enable_encoder_hetero_dp and stated not in (None, 1):
        yield (
            f"model.image_encoder.tensor_model_parallel_size={stated} contradicts enable_encoder_hetero_dp, which "
            "makes whole copies of the encoder: set it to 1, or drop the flag."
        )


def _only_images_are_spread(slot: str, parallel: ComponentParallel) -> Iterator[str]:
    reasons = {
        "context_parallel_size": "whole images are spread over ranks, never parts of one",
        "pipeline_model_parallel_size": "an encoder has no stages",
    }
    for name, reason in reasons.items():
        if (value := getattr(parallel, name)) not in (None, 1):
            yield f"model.{slot}.{name}={value} cannot be had, {reason}: leave it out or set it to 1."
    if parallel.sequence_parallel:
        yield (
            f"model.{slot}.sequence_parallel=True cannot be had, images of any length would have to split evenly: "
            "leave it out."
        )


def _grid(candidate: Candidate, encoder: EncoderLayout) -> Iterator[str]:
    layout, name = candidate.layout, "model.image_encoder.tensor_model_parallel_size"
    together = layout.tp * layout.cp
    stage = together * layout.dp
    grid = encoder_grid(candidate.config.parallel, candidate.world)
    if encoder.mode == "apart":
        if grid % encoder.tp:
            yield f"{name}={encoder.tp} does not divide encoder_ranks={grid}: use {divisors(grid)}."
    elif together % encoder.tp and encoder.tp % together:
        legal = [size for size in divisors(stage) if not (together % size and size % together)]
        yield (
            f"{name}={encoder.tp} is neither a divisor nor a multiple of tp x cp = {layout.tp} x {layout.cp} = "
            f"{together}, so its ranks would cut through a replica of the foundation: use {legal}."
        )
    elif stage % encoder.tp:
        legal = [size for size in divisors(stage) if not (together % size and size % together)]
        yield f"{name}={encoder.tp} does not divide the {stage} ranks of a pipeline stage: use {legal}."


def _apart(candidate: Candidate, encoder: EncoderLayout) -> Iterator[str]:
    """What megatron-core's BridgeCommunicator and its schedule for explicit groups can do."""
    layout, ranks = candidate.layout, candidate.config.parallel.encoder_ranks
    if encoder.mode != "apart":
        return
    if layout.cp > 1:
        yield (
            f"parallel.encoder_ranks={ranks} with context_parallel_size={layout.cp}: megatron-core's bridge between "
            "encoder and foundation carries whole sequences only; set context_parallel_size to 1, or encoder_ranks to "
            "0 with enable_full_hetero_dp."
        )
    if layout.vpp:
        yield (
            f"parallel.encoder_ranks={ranks} with virtual_pipeline_model_parallel_size={layout.vpp}: a foundation on "
            "ranks of its own is not interleaved; drop the virtual stages."
        )
    if ranks % encoder.tp == 0 and encoder.dp != layout.dp:
        yield (
            f"the encoder's {encoder.dp} copies (tp {encoder.tp}) on encoder_ranks={ranks} cannot serve the "
            f"foundation's {layout.dp}: there must be one for each. Use encoder_ranks={layout.dp * encoder.tp}, or "
            "another model.image_encoder.tensor_model_parallel_size."
        )


def _same_layout(candidate: Candidate, encoder: EncoderLayout) -> Iterator[str]:
    sizes = {"tensor_model_parallel_size": encoder.tp, "data_parallel_size": encoder.dp}
    for slot in SLOTS:
        component = candidate.config.model.components.get(slot)
        for name, size in sizes.items() if component is not None else ():
            stated = getattr(component.parallel, name) if component is not None else None
            if stated is None or stated == size:
                continue
            if name == "data_parallel_size":
                reason = f"but {size} copies follow from the layout ({encoder})"
            else:
                reason = f"but it runs where the encoder does, whose size is {size}"
            yield f"model.{slot}.{name}={stated}, {reason}: leave it out or set it to {size}."


def _widths(candidate: Candidate, encoder: EncoderLayout) -> Iterator[str]:
    geometry, projector, name = candidate.encoder_geometry, candidate.projector_geometry, "tensor_model_parallel_size"
    assert geometry is not None, "an encoder has a shape"
    widths = {
        "num_attention_heads": ("image_encoder", geometry.num_attention_heads),
        "ffn_hidden_size": ("image_encoder", geometry.ffn_hidden_size),
    }
    if projector is not None:
        merged = (projector.input_size or geometry.hidden_size) * geometry.spatial_merge_size**2
        widths["merged width"] = ("image_projector", merged)
    for what, (slot, width) in widths.items():
        if width % encoder.tp:
            yield (
                f"the encoder's {name}={encoder.tp} does not divide {slot}'s {what}={width}: set "
                f"model.image_encoder.{name} to a divisor of it, for example 1."
            )


def _deepstack(candidate: Candidate) -> Iterator[str]:
    layout, geometry = candidate.layout, candidate.encoder_geometry
    assert geometry is not None, "an encoder has a shape"
    layers = len(stage_chunks(candidate.geometry.num_layers, layout, 0)[0])
    if layers < geometry.levels <= candidate.geometry.num_layers:
        yield (
            f"the encoder hands features to the first {geometry.levels} layers of the foundation, but the first "
            f"pipeline chunk has {layers}: use fewer stages or virtual stages."
        )
    component = candidate.config.model.image_encoder
    assert component is not None, "asked of models with an encoder only"
    parallel, size = component.parallel, component.parallel.recompute_num_layers or 1
    inside = [layer for layer in geometry.deepstack_layers if (layer + 1) % size and layer + 1 < geometry.num_layers]
    if parallel.recompute_granularity == "full" and parallel.recompute_method == "uniform" and inside:
        yield (
            f"model.image_encoder.recompute_num_layers={size}: deepstack layers {inside} (from 0) lie inside a "
            "recomputed group, which answers its last layer alone; set it to 1, or recompute_method to 'block'."
        )
