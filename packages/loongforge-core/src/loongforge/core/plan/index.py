"""What an indexer that chooses keys holds, keeps and computes (DeepSeek Sparse Attention)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from loongforge.core.model.geometry import IndexGeometry, LatentGeometry, TransformerGeometry
from loongforge.core.plan.stages import stage_chunks, stage_sizes

if TYPE_CHECKING:
    from loongforge.core.plan.candidate import Candidate
    from loongforge.core.plan.layout import Layout
    from loongforge.core.plan.plan import Plan

INT32 = FP32 = 4


def matrices(geometry: TransformerGeometry, latent: LatentGeometry, index: IndexGeometry) -> int:
    """Elements of the three matrices: multiply-adds per token, too."""
    return (latent.q_lora_rank or 0) * index.heads * index.head_dim + geometry.hidden_size * (
        index.head_dim + index.heads
    )


def elements(geometry: TransformerGeometry) -> int:
    """Elements of one layer's indexer, which every tensor parallel rank holds: matrices, norm of the keys."""
    latent = geometry.latent
    index = None if latent is None else latent.index
    return 0 if latent is None or index is None else matrices(geometry, latent, index) + 2 * index.head_dim


def shared_layers(geometry: TransformerGeometry, layout: Layout, stage: int) -> int:
    """Layers of a pipeline stage without an indexer of their own."""
    chunks = stage_chunks(geometry.num_layers, layout, stage)
    return sum(layer in chunk for layer in geometry.shared_index_layers for chunk in chunks)


def keys_seen(latent: LatentGeometry | None, length: int) -> float:
    """Keys that a token of a document of `length` attends to in the mean, counted as half of the document without a
    choice; with one, no token attends to more than top-k."""
    topk = length if latent is None or latent.index is None else min(latent.index.topk, length)
    return topk - topk**2 / (2 * length)


def flops(geometry: TransformerGeometry, length: int) -> int:
    """Per token of a document of `length` in all layers with an indexer: projections, and scores of every key before
    the token.

    Where a loss teaches the indexer, the gradients of its matrices, and of the chosen keys' scores in queries and keys.
    No gradient goes on from it, and the loss itself is not counted.
    """
    latent = geometry.latent
    index = None if latent is None else latent.index
    if latent is None or index is None:
        return 0
    width, times = index.heads * index.head_dim, 1 + (index.loss_coeff > 0)
    scores = width * (length / 2 + 2 * (times - 1) * keys_seen(latent, length))
    layers = geometry.num_layers + geometry.prediction_layers - len(index.shared_layers)
    return round(2 * layers * (times * matrices(geometry, latent, index) + scores))


def kept_bytes(plan: Plan, *, element: int) -> float:
    """Bytes per token that one layer with an indexer keeps for its backward pass: a bit for every key. Where a loss
    teaches the indexer its operands besides, with what the weights of its heads come from in fp32 (divided under
    sequence parallelism; the keys of all), and of every chosen key the number, the score and what attention gave it."""
    latent, layout = plan.geometry.latent, plan.layout
    index = None if latent is None else latent.index
    if index is None:
        return 0.0
    bits = plan.seq_length / 8
    if not index.loss_coeff:
        return bits
    split = layout.tp if layout.sp else 1
    operands = (2 * index.heads * index.head_dim + 3 * index.head_dim) / split + index.head_dim * layout.cp
    chosen = (INT32 + 2 * FP32) * min(index.topk, plan.seq_length)
    wide = FP32 * (index.heads + (plan.geometry.hidden_size if element != FP32 else 0))
    return bits + operands * element + (chosen + wide) / split


def less_kept(plan: Plan, stage: int, *, element: int) -> float:
    """Bytes per token that the layers of a stage keep less where they have no indexer: all but the bits."""
    return shared_layers(plan.geometry, plan.layout, stage) * (kept_bytes(plan, element=element) - plan.seq_length / 8)


def told_bytes(plan: Plan, stage: int) -> int:
    """Bytes per token that recomputation saves of a stage's chunk: the numbers of the keys that its layers hand on, one
    tensor for each layer that chooses them."""
    shared, chunk = plan.geometry.shared_index_layers, stage_chunks(plan.geometry.num_layers, plan.layout, stage)[0]
    tellers = [layer for layer in chunk if layer not in shared and layer + 1 in shared]
    latent = plan.geometry.latent
    if not tellers or latent is None or latent.index is None:
        return 0
    return len(tellers) * INT32 * min(latent.index.topk, plan.seq_length) // (plan.layout.tp if plan.layout.sp else 1)


def index_rules(candidate: Candidate) -> Iterator[str]:
    """A loss teaches what trains; a selection does not travel between model chunks."""
    latent, foundation = candidate.geometry.latent, candidate.config.model.foundation
    if latent is None or latent.index is None:
        return
    if latent.index.loss_coeff and (foundation.freeze or candidate.adapters):
        yield (
            f"model.foundation: dsa_indexer_loss_coeff={latent.index.loss_coeff} teaches an indexer that does not "
            "train here: set it to 0, or train the foundation whole."
        )
    yield from _shared_rules(candidate, latent.index.shared_layers)


def _shared_rules(candidate: Candidate, shared: tuple[int, ...]) -> Iterator[str]:
    layers, encoder = candidate.geometry.num_layers, candidate.encoder_geometry
    outside = [layer for layer in shared if not 0 < layer < layers]
    if outside:
        yield (
            f"model.foundation: layers {outside} cannot attend to the keys of the layer before them, only layers 1 to "
            f"{layers - 1} can: correct them."
        )
        return
    if encoder is not None and shared and min(shared) <= encoder.levels:
        yield (
            f"model.foundation: the first {encoder.levels} layers add deepstack levels of the encoder and cannot hand "
            f"on the keys that they chose, but layer {min(shared)} attends to those of layer {min(shared) - 1}: use an "
            "encoder with fewer levels."
        )
    cut = _cut(shared, layers, candidate.layout)
    if not cut:
        return
    (stage, layer), last = cut[0], max(set(range(cut[0][1])) - set(shared))
    fitting = [first for first in range(1, layers) if _fits(shared, layers, candidate.layout, first)]
    remedy = "use fewer pipeline stages, without virtual ones"
    if fitting:
        nearest = min(fitting, key=lambda first: abs(first - layers / candidate.layout.pp))
        remedy = f"use for example --decoder-first-pipeline-num-layers {nearest}"
    yield (
        f"pipeline stage {stage} has a chunk that begins with layer {layer} (from 0), which attends to the keys that "
        f"layer {last} chose, and the choice stays within a chunk: {remedy}."
    )


def _cut(shared: tuple[int, ...], layers: int, layout: Layout) -> list[tuple[int, int]]:
    """Stages with a chunk whose first layer takes the selection of a layer outside, and that layer."""
    chunks = ((stage, chunk) for stage in range(layout.pp) for chunk in stage_chunks(layers, layout, stage))
    return [(stage, chunk[0]) for stage, chunk in chunks if chunk and chunk[0] in shared]


def _fits(shared: tuple[int, ...], layers: int, layout: Layout, first: int) -> bool:
    """Whether all layers find a stage, and every selection its chunk, with `first` layers in the first stage."""
    other = replace(layout, first_layers=first, last_layers=None)
    sizes = stage_sizes(layers, other)
    whole = sum(sizes) == layers and min(sizes) > 0 and not any(size % layout.num_chunks for size in sizes)
    return whole and not _cut(shared, layers, other)
