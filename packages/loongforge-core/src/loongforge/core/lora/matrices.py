"""The matrices of a language model that can have an adapter, from its geometry and its weight table. Imports no torch.

PEFT has one pair (A, B) for each Hugging Face module, and megatron-core fuses several of those into one linear layer.
The weight table says which; so each linear here has as many pairs as Hugging Face has modules, and nothing has to be
approximated on the way between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from loongforge.core.model.geometry import DeltaGeometry, LatentGeometry, TransformerGeometry
from loongforge.core.model.weights import (
    Copy,
    FuseDelta,
    FuseGateUp,
    FuseQKV,
    Rule,
    SplitQKV,
    StackedExperts,
    WeightTable,
)

LAYER = "decoder.layers.{layer}."
EXPERTS = "mlp.experts.local_experts.{expert}."
SHARED = "mlp.shared_experts."
WEIGHT = ".weight"

Split = Literal["rows", "columns", "whole"]
"""Of the matrix, over tensor parallel ranks: its outputs, its inputs, or not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One Hugging Face module that multiplies by a matrix, or the same one of every expert of a layer."""

    module: str
    """`model.layers.3.self_attn.q_proj`; `{expert}` stands for the number of an expert."""
    linear: str
    """The megatron-core module that holds it, by whole-model name: `decoder.layers.3.self_attention.linear_qkv`."""
    rule: Rule
    """What the weight table says of that linear's matrix."""
    layer: int
    experts: int | None
    """How many experts have it; None outside of experts."""
    split: Split
    inputs: int
    outputs: int

    @property
    def leaf(self) -> str:
        """`q_proj`."""
        return self.module.rpartition(".")[2]

    def name(self, expert: int) -> str:
        """The module's name; of this expert, where it is one's."""
        return self.module.format(expert=expert)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all modules that it is."""
        return tuple(self.name(expert) for expert in range(self.experts or 1))

    @property
    def is_router(self) -> bool:
        """Whether it chooses experts."""
        return self.linear.endswith("mlp.router")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What a model has."""

    matrices: tuple[Matrix, ...]
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    """Ends of names that a user may well ask for and cannot have, each with the reason."""


def inventory(table: WeightTable, geometry: TransformerGeometry) -> Inventory:
    """Every matrix, layer by layer in the order of the table."""
    found: list[Matrix] = []
    refused = {
        "embed_tokens": "an embedding is a table, not a matrix that multiplies, and its adapter would be another kind",
        "lm_head": "the output matrix is not adapted: its loss is computed without whole logits where that is faster",
    }
    for rule in table.rules:
        if isinstance(rule, StackedExperts):
            leaf = rule.hf.rpartition(".")[2]
            refused[leaf] = "this checkpoint stacks all experts in one tensor, which is no module with an adapter"
        elif rule.megatron.startswith(LAYER) and rule.megatron.endswith(WEIGHT):
            found += _of_rule(rule, geometry)
    found.sort(key=lambda one: one.layer)
    return Inventory(matrices=tuple(found), refused=refused)


def _of_rule(rule: Rule, geometry: TransformerGeometry) -> Iterator[Matrix]:
    place = rule.megatron.removeprefix(LAYER).removesuffix(WEIGHT)
    sizes = _sizes(geometry).get(place)
    if sizes is None:
        return  # a norm, a convolution
    experts = geometry.experts.num_experts if geometry.experts and place.startswith(EXPERTS) else None
    inputs, outputs = sizes
    for layer in _layers(place, geometry):
        numbers = {"layer": layer, "expert": "{expert}"}
        for name, rows in _parts(rule, outputs):
            yield Matrix(
                module=name.removesuffix(WEIGHT).format(**numbers),
                linear=rule.megatron.removesuffix(WEIGHT).format(**numbers),
                rule=rule,
                layer=layer,
                experts=experts,
                split=_split(rule),
                inputs=inputs,
                outputs=rows,
            )


def _split(rule: Rule) -> Split:
    if isinstance(rule, Copy):
        return "whole" if rule.shard_dim is None else ("rows", "columns")[rule.shard_dim]
    return "rows"


def _parts(rule: Rule, outputs: int) -> Iterator[tuple[str, int]]:
    """Hugging Face tensors behind a linear, each with its rows."""
    match rule:
        case Copy() | SplitQKV():
            yield rule.hf, outputs
        case FuseQKV():
            pair = rule.num_query_groups * rule.kv_channels
            yield rule.q, rule.num_attention_heads * rule.kv_channels * (1 + rule.gated)
            yield rule.k, pair
            yield rule.v, pair
        case FuseGateUp():
            yield rule.gate, outputs // 2
            yield rule.up, outputs // 2
        case FuseDelta():
            values = rule.num_value_heads * rule.value_head_dim
            yield rule.qkvz, 2 * (rule.num_key_heads * rule.key_head_dim + values)
            yield rule.ba, 2 * rule.num_value_heads
        case _:
            raise AssertionError(f"no linear of a language model has a rule of the kind {type(rule).__name__}")


def _layers(place: str, geometry: TransformerGeometry) -> Iterator[int]:
    """Layers that have this linear."""
    dense = geometry.num_layers if geometry.experts is None else geometry.experts.first_dense_layers
    delta = () if geometry.delta is None else geometry.delta.layers
    for layer in range(geometry.num_layers):
        if place.startswith("mlp."):
            here = (layer < dense) == place.startswith("mlp.linear_")
        else:
            here = (layer in delta) == (place in ("self_attention.in_proj", "self_attention.out_proj"))
        if here:
            yield layer


def _sizes(geometry: TransformerGeometry) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every linear by its place in a layer."""
    hidden, heads = geometry.hidden_size, geometry.num_attention_heads
    found = _mlp("mlp.", hidden, geometry.ffn_hidden_size)
    if experts := geometry.experts:
        found |= {"mlp.router": (hidden, experts.num_experts)} | _mlp(EXPERTS, hidden, experts.ffn_hidden_size)
        found |= _mlp(SHARED, hidden, experts.shared_ffn_hidden_size or 0)
    if geometry.latent is not None:
        attention = _latent(geometry.latent, hidden, heads)
    else:
        query, pair = heads * geometry.kv_channels, geometry.num_query_groups * geometry.kv_channels
        attention = {
            "linear_qkv": (hidden, query * (1 + geometry.attention_gate) + 2 * pair),
            "linear_proj": (query, hidden),
        }
    if geometry.delta is not None:
        attention |= _delta(geometry.delta, hidden)
    return found | {f"self_attention.{name}": sizes for name, sizes in attention.items()}


def _mlp(place: str, hidden: int, width: int) -> dict[str, tuple[int, int]]:
    return {f"{place}linear_fc1": (hidden, 2 * width), f"{place}linear_fc2": (width, hidden)}


def _latent(latent: LatentGeometry, hidden: int, heads: int) -> dict[str, tuple[int, int]]:
    query, rank = heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim), latent.q_lora_rank
    direct = {"linear_q_proj": (hidden, query)}
    low = {"linear_q_down_proj": (hidden, rank or 0), "linear_q_up_proj": (rank or 0, query)}
    return {
        **(direct if rank is None else low),
        "linear_kv_down_proj": (hidden, latent.kv_lora_rank + latent.qk_rope_head_dim),
        "linear_kv_up_proj": (latent.kv_lora_rank, heads * (latent.qk_nope_head_dim + latent.v_head_dim)),
        "linear_proj": (heads * latent.v_head_dim, hidden),
    }


def _delta(delta: DeltaGeometry, hidden: int) -> dict[str, tuple[int, int]]:
    values = delta.num_value_heads * delta.value_head_dim
    outputs = 2 * (delta.num_key_heads * delta.key_head_dim + values) + 2 * delta.num_value_heads
    return {"in_proj": (hidden, outputs), "out_proj": (values, hidden)}
