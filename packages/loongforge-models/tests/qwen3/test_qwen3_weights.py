"""The Qwen3 weight table names every tensor of transformers' model, and no other."""

from __future__ import annotations

from typing import Any

import pytest

from loongforge.core.model.weights import Copy, FuseGateUp, FuseQKV, Rule
from loongforge.models.qwen3.config import Qwen3Config
from loongforge.models.qwen3.weights import weights

TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 10,
    "vocab_size": 101,
}


def hf_names(rule: Rule) -> tuple[str, ...]:
    match rule:
        case Copy():
            return (rule.hf,)
        case FuseQKV():
            return (rule.q, rule.k, rule.v)
        case FuseGateUp():
            return (rule.gate, rule.up)


@pytest.mark.parametrize("tied", [True, False])
def test_table_covers_transformers_exactly(tied: bool) -> None:
    import torch
    from transformers import Qwen3Config as HFConfig
    from transformers import Qwen3ForCausalLM

    config = Qwen3Config(**TINY, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(HFConfig(**config.to_hf()))
    theirs = {name for name, _ in model.named_parameters()}
    ours = {
        name.replace("{layer}", str(layer))
        for rule in weights(config).rules
        for name in hf_names(rule)
        for layer in range(config.num_layers)
    }
    assert ours == theirs


def test_no_two_rules_for_one_parameter() -> None:
    names = [rule.megatron for rule in weights(Qwen3Config(**TINY)).rules]
    assert len(names) == len(set(names))
