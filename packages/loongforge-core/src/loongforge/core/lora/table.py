"""The weight table of adapters: PEFT's tensors and ours, from the rules of the matrices they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from loongforge.core.lora.matrices import WEIGHT, Split
from loongforge.core.model.weights import Copy, Rule, SplitQKV, StackedExperts, WeightTable, hf_names

ADAPTER = "lora"
"""Name of the module with the adapters inside a linear."""
OURS = rf".*\.{ADAPTER}\.\w+_[AB]"
"""Regular expression of the names of adapters' parameters."""
PEFT = "base_model.model."
"""What PEFT writes before the name of a module."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of ours is part of an adapter."""
    return re.fullmatch(OURS, name) is not None


def adapter_table(table: WeightTable) -> WeightTable:
    """Rules of every adapter a model with this table can have; the model's own parameters stay where they are."""
    rules = [rule for rule in table.rules if rule.megatron.endswith(WEIGHT) and not isinstance(rule, StackedExperts)]
    return WeightTable(
        rules=tuple(one for rule in rules for one in _pairs(rule)),
        left_out_hf=tuple(replace(one, hf=f"{re.escape(PEFT)}(?:{one.hf})") for one in table.left_out_hf),
        ignored_megatron=(rf"(?!{OURS}).*",),
    )


def without_adapters(table: WeightTable) -> WeightTable:
    """The table of the model, which leaves adapters alone."""
    return replace(table, ignored_megatron=(*table.ignored_megatron, OURS))


def _pairs(rule: Rule) -> Iterator[Rule]:
    split: Split = "rows"
    exchanged = isinstance(rule, Copy) and rule.halves_exchanged
    if isinstance(rule, Copy):
        split = "whole" if rule.shard_dim is None else ("rows", "columns")[rule.shard_dim]
    for name in hf_names(rule):
        module = name.removesuffix(WEIGHT)
        ours = f"{rule.megatron.removesuffix(WEIGHT)}.{ADAPTER}.{module.rpartition('.')[2]}"
        yield Copy(
            megatron=f"{ours}_A", hf=f"{PEFT}{module}.lora_A{WEIGHT}", shard_dim=1 if split == "columns" else None,
            halves_exchanged=exchanged,
        )  # fmt: skip
        megatron, hf = f"{ours}_B", f"{PEFT}{module}.lora_B{WEIGHT}"
        if isinstance(rule, SplitQKV):  # one module of all three: the rows of its B are brought into order as its own
            yield replace(rule, megatron=megatron, hf=hf)
        else:
            yield Copy(megatron=megatron, hf=hf, shard_dim=0 if split == "rows" else None)
