"""What a layer with a gated delta rule in place of attention holds, keeps and computes; where it can run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loongforge.core.model.geometry import DeltaGeometry, TransformerGeometry
from loongforge.core.plan.stages import stage_chunks

if TYPE_CHECKING:
    from loongforge.core.plan.candidate import Candidate
    from loongforge.core.plan.layout import Layout
    from loongforge.core.plan.plan import Plan

FP32 = 4
CHUNK = 64
"""Tokens whose corrections are solved at once."""


def delta_layers(geometry: TransformerGeometry, layout: Layout, stage: int) -> int:
    """Layers of a pipeline stage that have a gated delta rule."""
    if geometry.delta is None:
        return 0
    chunks = stage_chunks(geometry.num_layers, layout, stage)
    return sum(layer in chunk for layer in geometry.delta.layers for chunk in chunks)


def widths(delta: DeltaGeometry) -> tuple[int, int]:
    """Channels of all keys (and of all queries), and of all values."""
    return delta.num_key_heads * delta.key_head_dim, delta.num_value_heads * delta.value_head_dim


def matrices(geometry: TransformerGeometry, delta: DeltaGeometry) -> int:
    """Elements of the input and output projections: multiply-adds per token, too."""
    keys, values = widths(delta)
    return geometry.hidden_size * (2 * keys + 3 * values + 2 * delta.num_value_heads)


def split_elements(geometry: TransformerGeometry, delta: DeltaGeometry) -> int:
    """Elements of one layer that tensor parallel ranks share: matrices, convolution, rates and biases of the decay."""
    keys, values = widths(delta)
    return matrices(geometry, delta) + (2 * keys + values) * delta.conv_kernel + 2 * delta.num_value_heads


def rule_products(delta: DeltaGeometry) -> int:
    """Multiply-adds per token of the convolution and of the rule as a recurrence: decay aside, a state is read by the
    key, corrected, and read by the query."""
    keys, values = widths(delta)
    return (2 * keys + values) * delta.conv_kernel + 3 * values * delta.key_head_dim


def delta_bytes(plan: Plan, delta: DeltaGeometry, *, element: int, recomputed: bool) -> float:
    """Bytes per token that the layer keeps for its backward pass besides its norms, after division by tp.

    In the compute type: projections, convolved channels, gated output. In fp32: gate and normalised output, and, unless
    `recomputed`, the rule's operands in torch: unit queries and keys with and without their decay, values, corrections
    and what of the state each takes away, all three square matrices of a chunk, and one state per chunk.
    """
    keys, values = widths(delta)
    heads = delta.num_value_heads
    plain = 2 * keys + 2 * values + 2 * heads + values
    wide = 2 * values
    if not recomputed:
        plain += 2 * keys + values
        wide += 4 * keys + 4 * heads * delta.key_head_dim + 4 * values + 3 * heads * CHUNK
        wide += values * delta.key_head_dim / CHUNK
    return (plain * element + wide * FP32) / plan.layout.tp


def delta_rules(candidate: Candidate) -> Iterator[str]:
    """Key heads are what tensor parallel ranks share; a sequence is one recurrence."""
    from loongforge.core.plan.candidate import divisors

    geometry, layout, delta = candidate.geometry, candidate.layout, candidate.geometry.delta
    if delta is None:
        return
    if delta.num_value_heads % delta.num_key_heads:
        yield (
            f"model.foundation: num_value_heads={delta.num_value_heads} is not a multiple of num_key_heads="
            f"{delta.num_key_heads}: correct one of the two."
        )
    outside = [layer for layer in delta.layers if not 0 <= layer < geometry.num_layers]
    if outside:
        yield (
            f"model.foundation: delta layers {outside} are none of the {geometry.num_layers} layers, which are "
            "numbered from 0: correct them."
        )
    if delta.num_key_heads % layout.tp:
        yield (
            f"parallel.tensor_model_parallel_size={layout.tp} does not divide the {delta.num_key_heads} key heads of "
            f"the gated delta rule: use {divisors(delta.num_key_heads)}."
        )
    if layout.tp > 1 and not layout.sp:
        yield (
            f"a gated delta rule with tensor_model_parallel_size={layout.tp} needs sequence_parallel, by which the "
            "gradient of its head norm is summed over ranks: turn it on."
        )
    if layout.cp > 1:
        yield (
            f"parallel.context_parallel_size={layout.cp} splits sequences, which the gated delta rule reads as one "
            "recurrence: set it to 1 and use tensor or pipeline parallelism instead."
        )
