"""Arithmetic of a step and how much of it the pipeline leaves idle."""

from __future__ import annotations

from collections.abc import Sequence

from loongforge.core.model.geometry import EncoderGeometry, ProjectorGeometry, TransformerGeometry
from loongforge.core.plan.delta import matrices as delta_matrices
from loongforge.core.plan.delta import rule_products
from loongforge.core.plan.images import ImageBudget
from loongforge.core.plan.index import flops as index_flops
from loongforge.core.plan.index import keys_seen, warms_up
from loongforge.core.plan.parameters import dense_layers
from loongforge.core.plan.plan import Plan


def flops_per_token(plan: Plan, length: int | None = None) -> int:
    """Model FLOPs per token of the foundation, forward and backward, as Chowdhery et al., "PaLM" (2022), appendix B.

    In a document of `length` tokens, of the plan's sequence length when None.

    Two per multiply-add of every matrix that a token passes (of the experts: those it is sent to), three times for the
    forward pass and both gradients; attention counts half of s x s because it is causal, or with an indexer the chosen
    keys alone and the indexer besides. Recomputation, norms and the embedding look-up do not count. Further layers of
    multi-token prediction count with their projection and their pass through the output matrix.
    """
    geometry = plan.geometry
    length = plan.seq_length if length is None else length
    plain, further = dense_layers(geometry), geometry.prediction_layers
    sparse = geometry.num_layers - plain
    plain, sparse = (plain, sparse + further) if sparse else (plain + further, 0)
    layers, head = geometry.num_layers + further, geometry.hidden_size * plan.padded_vocab_size
    matrices = layers * _attention_matrices(geometry) + (1 + further) * head + further * 2 * geometry.hidden_size**2
    matrices += plain * (3 if geometry.swiglu else 2) * geometry.ffn_hidden_size * geometry.hidden_size
    if experts := geometry.experts:
        widths = 3 * (experts.topk * experts.ffn_hidden_size + (experts.shared_ffn_hidden_size or 0))
        matrices += sparse * geometry.hidden_size * (widths + experts.num_experts)
    if delta := geometry.delta:
        instead = delta_matrices(geometry, delta) + rule_products(delta)
        matrices += len(delta.layers) * (instead - _attention_matrices(geometry) - _products(geometry, length))
    whole = foundation_passes(plan) * 2 * (matrices + layers * _products(geometry, length))
    return whole + index_flops(geometry, length)


def foundation_passes(plan: Plan) -> int:
    """Forward, gradient of the input, gradient of the weights; frozen, the last is not computed, nor the one before it
    when nothing that comes earlier trains. Adapters need the first two, their own arithmetic is not counted; so does
    the warm-up of indexers, whose losses are reached through the layers above."""
    components = plan.config.model.components
    if plan.adapters or warms_up(plan.geometry):
        return 2
    if not components["foundation"].freeze:
        return 3
    return 2 if not all(component.freeze for component in components.values()) else 1


def _attention_matrices(geometry: TransformerGeometry) -> int:
    """Multiply-adds per token in the projections of one layer's attention."""
    hidden, heads, latent = geometry.hidden_size, geometry.num_attention_heads, geometry.latent
    if latent is None:
        query = heads * geometry.kv_channels
        return hidden * ((2 + geometry.attention_gate) * query + 2 * geometry.num_query_groups * geometry.kv_channels)
    query = heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
    up = latent.kv_lora_rank * heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    down = hidden * (latent.kv_lora_rank + latent.qk_rope_head_dim)
    low = hidden * query if latent.q_lora_rank is None else latent.q_lora_rank * (hidden + query)
    return low + down + up + heads * latent.v_head_dim * hidden


def _products(geometry: TransformerGeometry, length: int) -> int:
    """Multiply-adds per token of queries with keys and of probabilities with values, halved for the causal mask."""
    latent = geometry.latent
    if latent is None:
        return geometry.num_attention_heads * geometry.kv_channels * length
    both = latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim
    return round(geometry.num_attention_heads * both * keys_seen(latent, length))


def flops_per_step(plan: Plan) -> int:
    """Model FLOPs of the foundation in one optimizer step over all ranks."""
    return flops_per_token(plan) * plan.tokens_per_step


def encoder_flops(plan: Plan, grid: Sequence[int]) -> int:
    """Model FLOPs, forward and backward, of an item of `(t, h, w)` patches in the encoder and the projector.

    A component that is frozen, with nothing before it that trains, runs forward alone; 0 without an encoder.
    """
    model, encoder, projector = plan.config.model, plan.encoder_geometry, plan.projector_geometry
    if encoder is None or model.image_encoder is None:
        return 0
    encodes = _passes(plan, "image_encoder", before=False)
    forward = encoder.cost(grid) + grid[0] * grid[1] * grid[2] * encoder.patch_dim * encoder.hidden_size
    total = encodes * forward
    if projector is not None and model.image_projector is not None:
        passes = _passes(plan, "image_projector", before=encodes > 1)
        total += passes * encoder.features(grid) * projector_cost(projector, encoder)
    return round(2 * total)


def _passes(plan: Plan, component: str, *, before: bool) -> int:
    """Forward; the gradient of the input, which adapters need and what comes before; the gradient of the weights."""
    if not plan.trains(component):
        return 2 if before else 1
    return 2 if plan.adapters else 3


def encoder_flops_per_step(plan: Plan) -> int:
    """Model FLOPs of encoder and projector in one optimizer step over all ranks, at the images assumed."""
    if plan.encoder is None:
        return 0
    images = ImageBudget.of(plan)
    return round(plan.global_batch_size * images.images * encoder_flops(plan, images.grid))


def projector_cost(projector: ProjectorGeometry, encoder: EncoderGeometry) -> int:
    """Multiply-adds of the forward pass per feature, all levels together."""
    merged = (projector.input_size or 0) * encoder.spatial_merge_size**2
    return (1 + encoder.levels) * merged * (merged + (projector.output_size or 0))


def pipeline_bubble(plan: Plan) -> float:
    """Idle time relative to the time in work: (pp - 1) / (vpp x micro-batches).

    Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters" (2021), section 2.2.
    """
    layout = plan.layout
    return (layout.pp - 1) / (layout.num_chunks * plan.num_microbatches)
