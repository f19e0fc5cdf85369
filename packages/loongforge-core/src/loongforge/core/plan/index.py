"""What an indexer that chooses keys holds, keeps and computes (DeepSeek Sparse Attention)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from loongforge.core.model.geometry import IndexGeometry, LatentGeometry, TransformerGeometry
from loongforge.core.model.sparse_route import sparse_route
from loongforge.core.plan.stages import stage_chunks, stage_sizes
from loongforge.kernels.dsa_costs import Plan as Route

if TYPE_CHECKING:
    from loongforge.core.config.run import ModelConfig
    from loongforge.core.plan.candidate import Candidate
    from loongforge.core.plan.layout import Layout
    from loongforge.core.plan.plan import Plan

INT32 = FP32 = 4


def index_of(geometry: TransformerGeometry) -> IndexGeometry | None:
    """The indexer of a model that has one."""
    return None if geometry.latent is None else geometry.latent.index


def warms_up(geometry: TransformerGeometry) -> bool:
    """Whether indexers alone train, beside attention to every key."""
    index = index_of(geometry)
    return index is not None and index.warmup


def route_of(plan: Plan | Candidate) -> Route | None:
    """How a row of one document meets its chosen keys and why; None without an indexer."""
    geometry, layout, keys = plan.geometry, plan.layout, plan.config.train.seq_length
    if geometry.latent is None or geometry.latent.index is None:
        return None
    heads = geometry.num_attention_heads // layout.tp
    return sparse_route(geometry.latent, heads=heads, queries=keys // layout.cp, keys=keys)


def route_line(plan: Plan) -> str | None:
    """What `route_of` says, for the user."""
    route = route_of(plan)
    if route is None or warms_up(plan.geometry):
        return None if route is None else f"{route.line()}."
    return f"{route.line()}; packed rows go by their longest document."


def matrices(geometry: TransformerGeometry, latent: LatentGeometry, index: IndexGeometry) -> int:
    """Elements of the three matrices: multiply-adds per token, too."""
    return (latent.q_lora_rank or 0) * index.heads * index.head_dim + geometry.hidden_size * (
        index.head_dim + index.heads
    )


def elements(geometry: TransformerGeometry) -> int:
    """Elements of one layer's indexer, which every tensor parallel rank holds: matrices, norm of the keys."""
    latent, index = geometry.latent, index_of(geometry)
    return 0 if latent is None or index is None else matrices(geometry, latent, index) + 2 * index.head_dim


def shared_layers(geometry: TransformerGeometry, layout: Layout, stage: int) -> int:
    """Layers of a pipeline stage without an indexer of their own."""
    chunks = stage_chunks(geometry.num_layers, layout, stage)
    return sum(layer in chunk for layer in geometry.shared_index_layers for chunk in chunks)


def keys_seen(latent: LatentGeometry | None, length: int) -> float:
    """Keys that a token of a document of `length` attends to in the mean, counted as half of the document without a
    choice; with one, no token attends to more than top-k."""
    index = None if latent is None else latent.index
    topk = length if index is None or index.warmup else min(index.topk, length)
    return topk - topk**2 / (2 * length) if length else 0.0  # of length 0: what does not depend on the others


def flops(geometry: TransformerGeometry, length: int) -> int:
    """Per token of a document of `length` in all layers with an indexer: projections, and scores of every key before
    the token.

    Where a loss teaches the indexer, the gradients of its matrices, and of the chosen keys' scores in queries and keys.
    No gradient goes on from it, and the loss itself is not counted.
    """
    latent, index = geometry.latent, index_of(geometry)
    if latent is None or index is None:
        return 0
    width, times = index.heads * index.head_dim, 1 + (index.loss_coeff > 0)
    scores = width * (length / 2 + 2 * (times - 1) * keys_seen(latent, length))
    layers = geometry.num_layers + geometry.prediction_layers - len(index.shared_layers)
    return round(2 * layers * (times * matrices(geometry, latent, index) + scores))


def seen_bytes(plan: Plan) -> float:
    """Bytes per token that say which keys a layer attends to: a bit for every key, or the numbers of those chosen where
    rows are gathered; none in the warm-up."""
    index, route = index_of(plan.geometry), route_of(plan)
    if index is None or route is None or index.warmup:
        return 0.0
    return INT32 * min(index.topk, plan.seq_length) if route.route == "gather" else plan.seq_length / 8


def kept_bytes(plan: Plan, *, element: int) -> float:
    """Bytes per token that one layer with an indexer keeps for its backward pass: what `seen_bytes` says. Where a loss
    teaches the indexer its operands besides, with what the weights of its heads come from in fp32 (divided under
    sequence parallelism; the keys of all), and of every chosen key the number, the score and what attention gave it; in
    its warm-up gradients instead, as large as the operands."""
    index, layout = index_of(plan.geometry), plan.layout
    if index is None:
        return 0.0
    seen, chosen = seen_bytes(plan), min(index.topk, plan.seq_length)
    if not index.loss_coeff:
        return seen
    split = layout.tp if layout.sp else 1
    operands = (2 * index.heads * index.head_dim + 3 * index.head_dim) / split + index.head_dim * layout.cp
    taught = 0 if index.warmup else (INT32 + 2 * FP32) * chosen
    wide = FP32 * (index.heads + (plan.geometry.hidden_size if element != FP32 else 0))
    return seen + operands * element + (taught + wide) / split


def gathered_elements(plan: Plan, latent: LatentGeometry) -> float:
    """Per token and rank, kept by attention where rows of the latent are gathered: the rotated query, the query for the
    latent and what comes back through it, for each head; the rows of all context parallel ranks once, and the
    up-projection as one matrix, a token's share of it."""
    heads, rows = plan.geometry.num_attention_heads / plan.layout.tp, latent.kv_lora_rank + latent.qk_rope_head_dim
    query = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    matrix = heads * (latent.qk_nope_head_dim + latent.v_head_dim) * latent.kv_lora_rank
    tokens = plan.micro_batch_size * plan.seq_length / plan.layout.cp
    return heads * (query + rows + latent.kv_lora_rank) + rows * plan.layout.cp + matrix / tokens


def less_kept(plan: Plan, stage: int, *, element: int) -> float:
    """Bytes per token that the layers of a stage keep less where they have no indexer: all but `seen_bytes`."""
    return shared_layers(plan.geometry, plan.layout, stage) * (kept_bytes(plan, element=element) - seen_bytes(plan))


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
    """A loss teaches what trains, a route is one that there is, a selection does not travel between model chunks."""
    index, model = index_of(candidate.geometry), candidate.config.model
    if index is None:
        return
    dropped = [
        one for one in candidate.adapters if one.dropout > 0 and one.matrix.linear.endswith(".linear_kv_up_proj")
    ]
    if dropped and (route := route_of(candidate)) is not None and route.route == "gather":
        yield (
            f"lora.dropout={dropped[0].dropout:g} of linear_kv_up_proj drops channels of tokens, and sparse attention "
            "by the route 'gather' applies that matrix to none: use --dsa-route masked, or dropout=0 for it."
        )
    if index.warmup:
        yield from _warmup_rules(index, model)
    if index.loss_coeff and (model.foundation.freeze or candidate.adapters):
        yield (
            f"model.foundation: dsa_indexer_loss_coeff={index.loss_coeff} teaches an indexer that does not "
            "train here: set it to 0, or train the foundation whole."
        )
    yield from _shared_rules(candidate, index.shared_layers)


def _warmup_rules(index: IndexGeometry, model: ModelConfig) -> Iterator[str]:
    if not index.loss_coeff:
        yield (
            "model.foundation: dsa_indexer_warmup=True trains indexers alone, and dsa_indexer_loss_coeff=0 leaves them "
            "nothing to learn from: set it to 1."
        )
    if index.route != "auto":
        yield (
            f"model.foundation: dsa_route={index.route!r} is about chosen keys, and dsa_indexer_warmup=True attends to "
            "every key: leave one of them out."
        )
    if index.fp8:
        yield (
            "model.foundation: dsa_indexer_fp8=True is about the choice of keys, and dsa_indexer_warmup=True chooses "
            "none: leave one of them out."
        )
    for name, component in model.components.items():
        if name != "foundation" and not component.freeze:
            yield (
                f"model.{name} trains, but dsa_indexer_warmup=True trains the indexers of the foundation alone: set "
                f"+model.{name}.freeze=True."
            )


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
