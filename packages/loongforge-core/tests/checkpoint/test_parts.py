"""Names of a component as a whole model spells them."""

from __future__ import annotations

import re

import pytest

from loongforge.core.checkpoint.parts import renamed
from loongforge.core.model.weights import Copy, FuseQKV, StackedExperts, WeightTable

FOUNDATION = (("model.", "model.language_model."), ("lm_head.", "lm_head."))
QKV = FuseQKV(
    megatron="model.qkv",
    q="model.q.weight",
    k="model.k.weight",
    v="model.v.weight",
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=4,
)


def test_every_tensor_of_a_rule_is_renamed_and_nothing_else() -> None:
    experts = StackedExperts(megatron="e.{expert}", hf="model.layers.{layer}.experts", transposed=True, gate_up=True)
    head = Copy(megatron="output_layer.weight", hf="lm_head.weight", shard_dim=0, vocab=True)
    table = renamed(WeightTable(rules=(QKV, experts, head)), FOUNDATION)
    fused, stacked, copied = table.rules
    assert isinstance(fused, FuseQKV)
    assert (fused.megatron, fused.q, fused.v) == (
        "model.qkv",
        "model.language_model.q.weight",
        "model.language_model.v.weight",
    )
    assert stacked == StackedExperts(
        megatron="e.{expert}", hf="model.language_model.layers.{layer}.experts", transposed=True, gate_up=True
    )
    assert copied == head


def test_the_first_prefix_that_fits_counts_and_the_empty_one_always_does() -> None:
    table = WeightTable(rules=(Copy(megatron="a", hf="blocks.0.weight"), Copy(megatron="b", hf="merger.weight")))
    names = [
        rule.hf for rule in renamed(table, (("merger.", "projector."), ("", "visual."))).rules if isinstance(rule, Copy)
    ]
    assert names == ["visual.blocks.0.weight", "projector.weight"]


def test_a_tensor_without_a_place_in_the_whole_has_no_rule() -> None:
    table = WeightTable(rules=(Copy(megatron="a", hf="model.a"), Copy(megatron="b", hf="extra.b")))
    assert [rule.megatron for rule in renamed(table, FOUNDATION).rules] == ["a"]


@pytest.mark.parametrize(
    ("pattern", "prefixes", "name", "other"),
    [
        (r"lm_head\.weight", FOUNDATION, "lm_head.weight", "model.lm_head.weight"),
        (r"model\.layers\.\d+\.rotary\.inv_freq", FOUNDATION, "model.language_model.layers.3.rotary.inv_freq",
         "model.layers.3.rotary.inv_freq"),
        (r"rotary\.inv_freq|old\..*", (("", "model.visual."),), "model.visual.old.weight", "old.weight"),
        (r".*\.inv_freq", FOUNDATION, "model.language_model.layers.0.inv_freq", "model.language_model.inv"),
    ],
)  # fmt: skip
def test_patterns_of_ignored_tensors_follow(
    pattern: str, prefixes: tuple[tuple[str, str], ...], name: str, other: str
) -> None:
    (found,) = renamed(WeightTable(rules=(), ignored_hf=(pattern,)), prefixes).ignored_hf
    assert re.fullmatch(found, name)
    assert not re.fullmatch(found, other)
