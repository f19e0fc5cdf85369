"""The matrices of a model that can have an adapter, from its geometry and its weight table. Imports no torch.

PEFT has one pair (A, B) for each Hugging Face module, and megatron-core fuses several of those into one linear layer.
The weight table says which; so each linear here has as many pairs as Hugging Face has modules, and nothing has to be
approximated on the way between the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from loongforge.core.model.geometry import (
    DeltaGeometry,
    EncoderGeometry,
    LatentGeometry,
    ProjectorGeometry,
    TransformerGeometry,
)
from loongforge.core.model.weights import (
    Copy,
    FuseDelta,
    FuseGateUp,
    FuseQKV,
    Rule,
    SplitQKV,
    StackedExperts,
    WeightTable,
    hf_names,
)

LAYER = "decoder.layers.{layer}."
EXPERTS = "mlp.experts.local_experts.{expert}."
SHARED = "mlp.shared_experts."
FURTHER = re.compile(r"mtp\.layers\.(\d+)\.(?:mtp_model_layer\.)?")
"""What begins the name of a parameter of a further layer (multi-token prediction)."""
PROJECTION = "eh_proj"
"""The linear of a further layer that takes both of its inputs together."""
WEIGHT = ".weight"

Split = Literal["rows", "columns", "whole"]
"""Of the matrix, over tensor parallel ranks: its outputs, its inputs, or not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One Hugging Face module that multiplies by a matrix, or the same one of every expert of a layer."""

    component: str
    """`foundation`, `image_encoder`, `image_projector`."""
    module: str
    """`model.layers.3.self_attn.q_proj`; `{expert}` stands for the number of an expert."""
    linear: str
    """The megatron-core module that holds it, by whole-model name: `decoder.layers.3.self_attention.linear_qkv`."""
    rule: Rule
    """What the weight table says of that linear's matrix."""
    layer: int
    """From 0; further layers follow those of the decoder. Of a projector the level."""
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
    """What a component, or the whole model, has."""

    matrices: tuple[Matrix, ...]
    others: tuple[str, ...] = ()
    """Modules with a weight of another kind, whose names end like a matrix's now and then."""
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    """Ends of names that a user may well ask for and cannot have, each with the reason."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of everything that has a weight."""
        return (*(one.module for one in self.matrices), *self.others)


def inventory(table: WeightTable, geometry: TransformerGeometry) -> Inventory:
    """Every matrix of a language model, layer by layer in the order of the table."""
    refused = {
        "embed_tokens": "an embedding is a table, not a matrix that multiplies, and its adapter would be another kind",
        "lm_head": "the output matrix is not adapted: its loss is computed without whole logits where that is faster",
    }
    for rule in table.rules:
        if isinstance(rule, StackedExperts):
            leaf = rule.hf.rpartition(".")[2]
            refused[leaf] = "this checkpoint stacks all experts in one tensor, which is no module with an adapter"
    rules = [rule for rule in table.rules if not isinstance(rule, StackedExperts)]
    return _gathered(rules, [list(_of_rule(rule, geometry)) for rule in rules], refused)


def encoder_inventory(table: WeightTable, geometry: EncoderGeometry) -> Inventory:
    """Every matrix of an encoder's layers; the one behind the patches has the shape of a convolution and is none."""
    hidden, ffn = geometry.hidden_size, geometry.ffn_hidden_size
    sizes = {
        LAYER + "self_attention.linear_qkv": (hidden, 3 * hidden),
        LAYER + "self_attention.linear_proj": (hidden, hidden),
        LAYER + "mlp.linear_fc1": (hidden, (2 if geometry.gated else 1) * ffn),
        LAYER + "mlp.linear_fc2": (ffn, hidden),
    }
    return _of_tower(table, "image_encoder", sizes, {"layer": geometry.num_layers})


def projector_inventory(table: WeightTable, geometry: ProjectorGeometry, encoder: EncoderGeometry) -> Inventory:
    """Both matrices of every level's MLP."""
    assert geometry.input_size is not None, "a plan fills in the sizes"
    assert geometry.output_size is not None, "a plan fills in the sizes"
    merged = geometry.input_size * encoder.spatial_merge_size**2
    sizes = {
        f"{level}.mlp.linear_{name}": (merged, outputs)
        for level in ("merger", "deepstack_mergers.{level}")
        for name, outputs in (("fc1", merged), ("fc2", geometry.output_size))
    }
    return _of_tower(table, "image_projector", sizes, {"level": encoder.levels})


def _of_tower(
    table: WeightTable, component: str, sizes: Mapping[str, tuple[int, int]], counts: Mapping[str, int]
) -> Inventory:
    """Matrices of the linears in `sizes`, as often as `counts` says of the placeholder in their name."""
    found: list[list[Matrix]] = []
    for rule in table.rules:
        linear = rule.megatron.removesuffix(WEIGHT)
        inputs, outputs = sizes.get(linear, (0, 0)) if rule.megatron.endswith(WEIGHT) else (0, 0)
        name, count = next(((name, count) for name, count in counts.items() if f"{{{name}}}" in linear), ("", 1))
        found.append(
            [
                Matrix(
                    component=component,
                    module=module.removesuffix(WEIGHT).format(**{name: number}),
                    linear=linear.format(**{name: number}),
                    rule=rule,
                    layer=number,
                    experts=None,
                    split=_split(rule),
                    inputs=inputs,
                    outputs=rows,
                )
                for number in range(count if outputs else 0)
                for module, rows in _parts(rule, outputs)
            ]
        )
    return _gathered(table.rules, found, {})


def _gathered(rules: Iterable[Rule], found: Iterable[list[Matrix]], refused: Mapping[str, str]) -> Inventory:
    """By layer; a rule without a matrix that moves a weight tells of another kind of module."""
    matrices: list[Matrix] = []
    others: list[str] = []
    for rule, some in zip(rules, found, strict=True):
        matrices += some
        others += [] if some else [name.removesuffix(WEIGHT) for name in hf_names(rule) if name.endswith(WEIGHT)]
    return Inventory(matrices=tuple(sorted(matrices, key=lambda one: one.layer)), others=tuple(others), refused=refused)


def _of_rule(rule: Rule, geometry: TransformerGeometry) -> Iterator[Matrix]:
    name = rule.megatron.removesuffix(WEIGHT)
    if further := FURTHER.match(name):
        place, among = name[further.end() :], [geometry.num_layers + int(further[1])]
    else:
        place, among = name.removeprefix(LAYER), range(geometry.num_layers)
    sizes = _sizes(geometry).get(place) if rule.megatron.endswith(WEIGHT) else None
    if sizes is None:
        return  # a norm, a bias, a convolution, the embedding
    experts = geometry.experts.num_experts if geometry.experts and place.startswith(EXPERTS) else None
    inputs, outputs = sizes
    for layer in among:
        if not _has(place, layer, geometry):
            continue
        numbers = {"layer": layer, "expert": "{expert}"}
        for module, rows in _parts(rule, outputs):
            yield Matrix(
                component="foundation",
                module=module.removesuffix(WEIGHT).format(**numbers),
                linear=name.format(**numbers),
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


def _has(place: str, layer: int, geometry: TransformerGeometry) -> bool:
    """Whether a layer has this linear; a further layer, behind them all, is like the last one with attention."""
    dense = geometry.num_layers if geometry.experts is None else geometry.experts.first_dense_layers
    delta = () if geometry.delta is None else geometry.delta.layers
    if place.startswith("mlp."):
        return (min(layer, geometry.num_layers - 1) < dense) == place.startswith("mlp.linear_")
    if place == PROJECTION:
        return layer >= geometry.num_layers
    return (layer in delta) == (place in ("self_attention.in_proj", "self_attention.out_proj"))


def _sizes(geometry: TransformerGeometry) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every linear by its place in a layer."""
    hidden, heads = geometry.hidden_size, geometry.num_attention_heads
    found = {PROJECTION: (2 * hidden, hidden)} | _mlp("mlp.", hidden, geometry.ffn_hidden_size)
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
