"""Which layers each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from loongforge.core.plan.candidate import Candidate, divisors
from loongforge.core.plan.layout import Layout


def stage_sizes(num_layers: int, layout: Layout) -> tuple[int, ...]:
    """Layers of every stage: as many as the first or the last is said to have, the rest shared evenly by the others."""
    first, last = layout.first_layers, layout.last_layers
    others = layout.pp - (first is not None) - (last is not None)
    each = (num_layers - (first or 0) - (last or 0)) // max(1, others)
    sizes = [each] * layout.pp
    if first is not None:
        sizes[0] = first
    if last is not None:
        sizes[-1] = last
    return tuple(sizes)


def stage_chunks(num_layers: int, layout: Layout, stage: int) -> tuple[range, ...]:
    """Numbers of the layers in each model chunk of a stage.

    A chunk is a run of neighbouring layers. With interleaving every stage has one in each round over the stages.
    """
    sizes = [size // layout.num_chunks for size in stage_sizes(num_layers, layout)]
    before = [0, *accumulate(sizes)]
    starts = [turn * before[-1] + before[stage] for turn in range(layout.num_chunks)]
    return tuple(range(start, start + sizes[stage]) for start in starts)


def stage_rules(candidate: Candidate) -> Iterator[str]:
    """All layers find a stage, and every stage has some."""
    layout, layers = candidate.layout, candidate.geometry.num_layers
    if layout.first_layers is None and layout.last_layers is None:
        yield from _even(layout, layers)
        return
    first, last = "parallel.decoder_first_pipeline_num_layers", "parallel.decoder_last_pipeline_num_layers"
    if layout.pp == 1:
        yield f"{first} and {last} say how stages differ, but pipeline_model_parallel_size=1: leave them out."
        return
    given = (layout.first_layers or 0) + (layout.last_layers or 0)
    others = layout.pp - (layout.first_layers is not None) - (layout.last_layers is not None)
    left = layers - given
    said = f"{first}={layout.first_layers} and {last}={layout.last_layers} leave {left} of {layers} layers"
    if left < others or (left and not others):
        yield f"{said} for {others} other stages: change one of the two, or the number of stages."
    elif others and left % others:
        name, size = (last, layout.last_layers) if layout.last_layers is not None else (first, layout.first_layers)
        fitting = [one for one in range(1, layers) if (left + (size or 0) - one) % others == 0]
        nearest = min(fitting, key=lambda one: abs(one - (size or 0)))
        yield f"{said}, not a multiple of the {others} other stages: use for example {name}={nearest}."
    elif uneven := [size for size in stage_sizes(layers, layout) if size % layout.num_chunks]:
        yield (
            f"a stage of {uneven[0]} layers cannot be {layout.num_chunks} equal virtual stages: choose stages of a "
            f"multiple of {layout.num_chunks} layers, or drop virtual_pipeline_model_parallel_size."
        )


def _even(layout: Layout, layers: int) -> Iterator[str]:
    chunks = layout.pp * layout.num_chunks
    if layers % chunks:
        yield (
            f"num_layers={layers} is not a multiple of pipeline stages x virtual stages = {layout.pp} x "
            f"{layout.num_chunks} = {chunks}: use a product among {divisors(layers)}, or give the first or the last "
            "stage another number of layers with --decoder-first-pipeline-num-layers or "
            "--decoder-last-pipeline-num-layers."
        )
