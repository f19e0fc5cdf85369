"""Exact parameter counts of a decoder: whole, per pipeline stage, per rank. Those of encoders are in `towers`."""

from __future__ import annotations

from dataclasses import dataclass

from loongforge.core.model.geometry import ExpertGeometry, LatentGeometry, TransformerGeometry
from loongforge.core.plan.delta import delta_layers, split_elements
from loongforge.core.plan.index import elements as index_elements
from loongforge.core.plan.index import shared_layers
from loongforge.core.plan.layout import Layout
from loongforge.core.plan.stages import stage_chunks, stage_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Elements:
    """Elements by how they are spread over ranks."""

    split: int = 0
    """Matrices and their biases, divided over tensor parallel ranks."""
    replicated: int = 0
    """Norms, routers, the down-projections and the indexer of latent attention: held by every tensor parallel rank."""
    experts: int = 0
    """Divided over expert (tensor) parallel ranks."""

    @property
    def total(self) -> int:
        """All of them, once."""
        return self.split + self.replicated + self.experts

    def __add__(self, other: Elements) -> Elements:
        return Elements(
            split=self.split + other.split,
            replicated=self.replicated + other.replicated,
            experts=self.experts + other.experts,
        )

    def __mul__(self, times: int) -> Elements:
        return Elements(split=self.split * times, replicated=self.replicated * times, experts=self.experts * times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Parameters of one rank, by the ranks that hold copies of them."""

    dense: int
    """Copied on every data and context parallel rank."""
    experts: int
    """Copied on every expert data parallel rank."""

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.experts


def layer_elements(geometry: TransformerGeometry, *, experts: bool) -> Elements:
    """One decoder layer, with its experts or with a plain MLP in their place."""
    attention = _attention(geometry) if geometry.latent is None else _latent(geometry, geometry.latent)
    if experts:
        assert geometry.experts is not None, "asked of mixtures of experts only"
        inner = _experts(geometry, geometry.experts)
    else:
        inner = Elements(split=(3 if geometry.swiglu else 2) * geometry.ffn_hidden_size * geometry.hidden_size)
    return attention + inner + Elements(replicated=2 * geometry.hidden_size)


def _attention(geometry: TransformerGeometry) -> Elements:
    """Fused QKV, output projection, norms of query and key heads."""
    hidden, head = geometry.hidden_size, geometry.kv_channels
    query, key_value = geometry.num_attention_heads * head, 2 * geometry.num_query_groups * head
    norms = (query + key_value // 2) if geometry.qk_norm_whole else 2 * head
    return Elements(
        split=(query * (1 + geometry.attention_gate) + key_value) * (hidden + geometry.add_qkv_bias) + query * hidden,
        replicated=norms if geometry.qk_layernorm else 0,
    )


def _latent(geometry: TransformerGeometry, latent: LatentGeometry) -> Elements:
    """Down-projections, their norms and an indexer are whole on every rank; up-projections and the output projection
    are split."""
    hidden, heads = geometry.hidden_size, geometry.num_attention_heads
    query = heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
    up = heads * (latent.qk_nope_head_dim + latent.v_head_dim) * latent.kv_lora_rank
    down = hidden * (latent.kv_lora_rank + latent.qk_rope_head_dim) + latent.kv_lora_rank
    if latent.q_lora_rank is None:
        up += query * hidden
    else:
        up += query * latent.q_lora_rank
        down += hidden * latent.q_lora_rank + latent.q_lora_rank
    return Elements(split=up + heads * latent.v_head_dim * hidden, replicated=down + index_elements(geometry))


def _experts(geometry: TransformerGeometry, experts: ExpertGeometry) -> Elements:
    """Gated MLPs, the router, and the expert that every token passes; the bias of the choice is no parameter."""
    hidden = geometry.hidden_size
    return Elements(
        split=3 * (experts.shared_ffn_hidden_size or 0) * hidden,
        replicated=(experts.num_experts + experts.shared_gate) * hidden,
        experts=experts.num_experts * 3 * experts.ffn_hidden_size * hidden,
    )


def _delta_instead(geometry: TransformerGeometry) -> Elements:
    """What a layer has more, or less, with a gated delta rule in place of attention."""
    delta = geometry.delta
    if delta is None:
        return Elements()
    whole = Elements(split=split_elements(geometry, delta), replicated=delta.value_head_dim)
    return whole + _attention(geometry) * -1


def _shared_instead(geometry: TransformerGeometry) -> Elements:
    """What a layer has less that attends to the keys of the layer before it."""
    return Elements(replicated=-index_elements(geometry))


def further_elements(geometry: TransformerGeometry) -> Elements:
    """All further layers of multi-token prediction: each a decoder layer like the last one, with attention; the
    projection of hidden state and embedding; three norms. They share the embedding and the output matrix."""
    hidden = geometry.hidden_size
    layer = layer_elements(geometry, experts=dense_layers(geometry) < geometry.num_layers)
    return (layer + Elements(split=2 * hidden * hidden, replicated=3 * hidden)) * geometry.prediction_layers


def dense_layers(geometry: TransformerGeometry) -> int:
    """Layers at the beginning that have a plain MLP."""
    return geometry.num_layers if geometry.experts is None else geometry.experts.first_dense_layers


def count_parameters(geometry: TransformerGeometry, padded_vocab_size: int) -> int:
    """Parameters of the whole model; a tied embedding counts once, padded vocabulary rows count."""
    tables = 1 if geometry.tie_word_embeddings else 2
    plain = dense_layers(geometry)
    total = layer_elements(geometry, experts=False).total * plain
    if plain < geometry.num_layers:
        total += layer_elements(geometry, experts=True).total * (geometry.num_layers - plain)
    total += _delta_instead(geometry).total * (len(geometry.delta.layers) if geometry.delta else 0)
    total += _shared_instead(geometry).total * len(geometry.shared_index_layers)
    total += further_elements(geometry).total
    return total + geometry.hidden_size + tables * padded_vocab_size * geometry.hidden_size


def stage_layers(geometry: TransformerGeometry, layout: Layout, stage: int) -> tuple[int, int]:
    """Layers of one pipeline stage: those with a plain MLP, and all."""
    plain, chunks = dense_layers(geometry), stage_chunks(geometry.num_layers, layout, stage)
    return sum(number < plain for chunk in chunks for number in chunk), sum(map(len, chunks))


def stage_held(geometry: TransformerGeometry, padded_vocab_size: int, layout: Layout) -> tuple[Held, ...]:
    """What one rank of each pipeline stage holds, in stage order."""
    table = padded_vocab_size // layout.tp * geometry.hidden_size
    stages: list[Held] = []
    for stage in range(layout.pp):
        plain, layers = stage_layers(geometry, layout, stage)
        elements = layer_elements(geometry, experts=False) * plain
        if plain < layers:
            elements += layer_elements(geometry, experts=True) * (layers - plain)
        elements += _delta_instead(geometry) * delta_layers(geometry, layout, stage)
        elements += _shared_instead(geometry) * shared_layers(geometry, layout, stage)
        ends = table * (stage == 0)
        if stage == layout.pp - 1:
            elements += further_elements(geometry)
            ends += geometry.hidden_size
            ends += table * (layout.pp > 1 or not geometry.tie_word_embeddings)
            # Further layers embed tokens: the last stage has the table too, where a tied output matrix is not it.
            ends += table * (layout.pp > 1 and geometry.prediction_layers > 0 and not geometry.tie_word_embeddings)
        stages.append(
            Held(
                dense=elements.split // layout.tp + elements.replicated + ends,
                experts=elements.experts // (layout.ep * layout.etp),
            )
        )
    return tuple(stages)


def stage_parameters(geometry: TransformerGeometry, padded_vocab_size: int, layout: Layout) -> tuple[int, ...]:
    """Parameters that one rank of each pipeline stage holds, in stage order.

    With tied embeddings or further prediction layers and several stages the last one holds a copy of the table: the sum
    exceeds `count_parameters`.
    """
    return tuple(held.total for held in stage_held(geometry, padded_vocab_size, layout))


def stage_indexers(geometry: TransformerGeometry, layout: Layout) -> tuple[Held, ...]:
    """What indexers, which choose keys, hold on one rank of each pipeline stage, in stage order."""
    layers = [
        size - shared_layers(geometry, layout, stage)
        for stage, size in enumerate(stage_sizes(geometry.num_layers, layout))
    ]
    layers[-1] += geometry.prediction_layers
    return tuple(Held(dense=index_elements(geometry) * count, experts=0) for count in layers)
