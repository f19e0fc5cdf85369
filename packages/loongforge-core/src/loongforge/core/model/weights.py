"""The two-way weight table of a family: how Hugging Face tensors become megatron-core parameters and back.

A rule is plain data. It names one megatron-core parameter (`{layer}` stands for the global layer number, `{expert}` for
the global expert number, any other `{name}` for a number that is the same on both sides), the Hugging
Face tensors behind it, and how tensor parallelism splits it. The engine in `loongforge.ckpt` runs the same table for
online load, online save and offline conversion, reading only the slices a rank owns.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One tensor, same layout on both sides."""

    megatron: str
    hf: str
    shard_dim: int | None = None
    """Dimension split over tensor parallel ranks; None when every rank holds the whole tensor."""
    vocab: bool = False
    """Rows are tokens: padded in megatron-core to a multiple of the tensor parallel size, cut on export."""
    halves_exchanged: bool = False
    """Of a matrix `[out, in]`: the second half of its columns stands first in the Hugging Face tensor."""
    again: tuple[str, ...] = ()
    """Further Hugging Face tensors that hold the same once more: written on export, and not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseQKV:
    """Query, key and value rows interleaved per key/value group: `[q x r, k, v]` for each group, then the next.

    Weights `[heads x d, hidden]` and biases `[heads x d]` alike. Split over tensor parallel ranks by group.
    """

    megatron: str
    q: str
    k: str
    v: str
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    gated: bool = False
    """`q` has two blocks of rows for each head, its query and the gate of its output: `[q x r, gate x r, k, v]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseGateUp:
    """Gate rows, then up rows. Each tensor parallel rank holds its part of the gate above its part of the up matrix."""

    megatron: str
    gate: str
    up: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitQKV:
    """One tensor `[3 x heads x d, ...]` (all queries, all keys, all values) interleaved per head: `[q, k, v]` each.

    Weights and biases alike. Split over tensor parallel ranks by head.
    """

    megatron: str
    hf: str
    num_attention_heads: int
    kv_channels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseDelta:
    """Projections of a gated delta rule, key head by key head: `[q, k, v x r, z x r, b x r, a x r]`, then the next.

    `qkvz` and `ba` stand key head by key head too, `[q, k, v x r, z x r]` and `[b x r, a x r]`; q and k of
    `key_head_dim` rows, v and z of `value_head_dim` for each of a key head's r value heads, b and a of one. Split over
    tensor parallel ranks by key head.
    """

    megatron: str
    qkvz: str
    ba: str
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitDelta:
    """Rows of all queries, all keys, all values, brought into the order of `FuseDelta`: `[q, k, v x r]` a key head."""

    megatron: str
    hf: str
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedExperts:
    """One expert's matrix out of a tensor that holds all experts: block `{expert}` of the first dimension.

    `megatron` has `{expert}`, the number over the whole model; `hf` is `[experts, ...]`. Expert parallel ranks read
    their own blocks only.
    """

    megatron: str
    hf: str
    transposed: bool
    """A block is stored `[in, out]`."""
    gate_up: bool = False
    """The output dimension holds the gate, then the up matrix: each tensor parallel rank has its part of both."""
    shard_dim: int | None = None
    """Dimension of the block in megatron's order `[out, in]` that tensor parallelism inside experts splits."""


Rule = Copy | FuseQKV | FuseGateUp | SplitQKV | FuseDelta | SplitDelta | StackedExperts
"""`Copy` and `FuseGateUp` may name an expert too: `{expert}` in both names is its number over the whole model."""


def hf_names(rule: Rule) -> tuple[str, ...]:
    """The Hugging Face tensors behind a rule."""
    match rule:
        case Copy() | SplitQKV() | SplitDelta() | StackedExperts():
            return (rule.hf,)
        case FuseQKV():
            return (rule.q, rule.k, rule.v)
        case FuseGateUp():
            return (rule.gate, rule.up)
        case FuseDelta():
            return (rule.qkvz, rule.ba)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A part of a released model that a run may do without."""

    hf: str
    """Regular expression of its Hugging Face tensors."""
    what: str
    """What it is, for a message: `multi-token prediction`."""
    remedy: str
    """What has it loaded: `--mtp-num-layers 1 trains it`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTable:
    """All rules of a model, complete in both directions.

    A megatron-core parameter without a rule, or a Hugging Face tensor without one, is an error when weights move.
    """

    rules: tuple[Rule, ...]
    ignored_hf: tuple[str, ...] = ()
    """Regular expressions of Hugging Face tensors that carry no weight of ours (a tied head, a rotary table)."""
    left_out_hf: tuple[LeftOut, ...] = ()
    """Parts of the released model that this one is built without; loading says so."""
    ignored_megatron: tuple[str, ...] = ()
    """Regular expressions of parameters that another table moves (adapters, or all but adapters)."""
