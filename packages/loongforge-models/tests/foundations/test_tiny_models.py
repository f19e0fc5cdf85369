"""Tiny models of every family against transformers: nothing is lost on the way, and every tensor has its rule."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from released import FAMILIES

from loongforge.core import plugins
from loongforge.core.model.weights import FuseGateUp, FuseQKV

SHARED: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 6,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "norm_epsilon": 1e-5,
    "rotary_base": 12345.0,
    "init_method_std": 0.03,
    "attention_dropout": 0.1,
    "bos_token_id": 5,
    "eos_token_id": (7, 9),
    "pad_token_id": 3,
}
GROUPED = {"num_query_groups": 2, "kv_channels": 10}
EXPERTS = {"num_experts": 12, "moe_router_topk": 4, "moe_ffn_hidden_size": 22}
LATENT = {"kv_lora_rank": 14, "qk_head_dim": 18, "qk_pos_emb_head_dim": 6, "v_head_dim": 16}
YARN = {
    "rotary_scaling_factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 30.0,
    "beta_slow": 2.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
DELTA = {
    "linear_attention_freq": 2,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 14,
    "linear_conv_kernel_dim": 5,
    "moe_shared_expert_intermediate_size": 26,
}
SPARSE = {
    **EXPERTS,
    **LATENT,
    "attention_dropout": 0.0,
    "q_lora_rank": 26,
    "first_dense_layers": 1,
    "moe_shared_expert_intermediate_size": 44,
    "dsa_indexer_n_heads": 5,
    "dsa_indexer_head_dim": 8,
    "dsa_indexer_topk": 11,
}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk_scaling_factor": 1.7}

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen": ("qwen", {"stretched_beyond": 32, "use_dynamic_ntk": True}),
    "internlm2": ("internlm2", {"num_query_groups": 2}),
    "internlm2 stretched": ("internlm2", {"num_query_groups": 3, "dynamic_rope_factor": 2.5}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2 tied": ("qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "llama": ("llama", GROUPED),
    "llama3.1 tied": (
        "llama",
        {
            **GROUPED,
            "tie_word_embeddings": True,
            "rope_scaling_factor": 6.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**GROUPED, **EXPERTS, "moe_aux_loss_coeff": 0.25}),
    "qwen3_moe share of all": ("qwen3_moe", {**GROUPED, **EXPERTS, "moe_router_pre_softmax": True}),
    "qwen3_next": (
        "qwen3_next",
        {**GROUPED, **EXPERTS, **DELTA, "rotary_percent": 0.6, "moe_aux_loss_coeff": 0.25},
    ),
    "glm4_moe": (
        "glm4_moe",
        {
            **GROUPED,
            **EXPERTS,
            "add_qkv_bias": True,
            "qk_layernorm": True,
            "rotary_percent": 0.6,
            "first_dense_layers": 1,
            "moe_shared_expert_intermediate_size": 22,
            "moe_router_topk_scaling_factor": 1.7,
        },
    ),
    "glm4_moe no head norms": (
        "glm4_moe",
        {**GROUPED, **EXPERTS, "rotary_percent": 0.6, "moe_shared_expert_intermediate_size": 44},
    ),
    "deepseek2": (
        "deepseek2",
        {
            **EXPERTS,
            **LATENT,
            **YARN,
            **GROUPS,
            "q_lora_rank": 26,
            "first_dense_layers": 1,
            "moe_shared_expert_intermediate_size": 44,
        },
    ),
    "deepseek2 direct queries": (
        "deepseek2",
        {**EXPERTS, **LATENT, "q_lora_rank": None, "moe_shared_expert_intermediate_size": 22},
    ),
    "minimax_m2": (
        "minimax_m2",
        {**GROUPED, "num_experts": 12, "moe_router_topk": 4, "rotary_percent": 0.6, "moe_aux_loss_coeff": 0.25},
    ),
    "deepseek3": (
        "deepseek3",
        {
            **EXPERTS,
            **LATENT,
            **YARN,
            **GROUPS,
            "q_lora_rank": 26,
            "first_dense_layers": 1,
            "moe_shared_expert_intermediate_size": 44,
        },
    ),
    "deepseek32": ("deepseek32", {**SPARSE, **YARN, **GROUPS}),
    "glm5": ("glm5", {**SPARSE, "dsa_indexer_topk_freq": 2}),
    "glm5 pattern": ("glm5", {**SPARSE, "dsa_indexer_pattern": "FSS"}),
    "mimo": ("mimo", GROUPED),
    "deepseek3 direct queries": (
        "deepseek3",
        {**EXPERTS, **LATENT, "q_lora_rank": None, "moe_shared_expert_intermediate_size": 22},
    ),
}


KNOWN = [case for case, (family, _) in TINY.items() if FAMILIES[family].transformers]
"""Cases that transformers has a class for; the tensors of the others are in integration/zoo."""


def tiny(case: str) -> Any:
    family, values = TINY[case]
    return plugins.load("models", family).config()(**{**SHARED, **values})


@pytest.mark.parametrize("case", TINY)
def test_a_written_file_says_every_field(case: str) -> None:
    config = tiny(case)
    assert type(config).from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("case", KNOWN)
def test_transformers_keeps_every_field(case: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = tiny(case)
    written = json.loads(json.dumps(config.to_hf()))
    theirs = AutoConfig.for_model(**written)
    theirs.architectures = written["architectures"]
    theirs.save_pretrained(tmp_path)
    assert type(config).from_hf(json.loads((tmp_path / "config.json").read_text())) == config


@pytest.mark.parametrize("case", KNOWN)
def test_every_saved_tensor_has_one_rule_and_every_rule_a_tensor(case: str, tmp_path: Path, reader: Any) -> None:
    """Names and shapes as `save_pretrained` writes them."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny(case)
    table = reader(plugins.load("models", TINY[case][0]).weights()(config))
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_hf())).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    for name, shape in shapes.items():
        rules = table.claims(name)
        assert len(rules) == 1, (name, rules)
        check_shape(rules[0], name, shape, config)
    assert table.idle(list(shapes)) == []


def check_shape(rule: Any, name: str, shape: tuple[int, ...], config: Any) -> None:
    if isinstance(rule, FuseQKV):
        heads = rule.num_attention_heads * (1 + rule.gated) if "q_proj" in name else rule.num_query_groups
        assert shape[0] == heads * rule.kv_channels, name
    elif isinstance(rule, FuseGateUp):
        widths = {config.ffn_hidden_size}
        if ".experts." in name:
            widths = {config.geometry().experts.ffn_hidden_size}
        elif "shared_expert" in name:
            widths = {config.moe_shared_expert_intermediate_size}
        assert {shape[0]} == widths, name


@pytest.mark.parametrize("case", TINY)
def test_no_two_rules_for_one_parameter(case: str) -> None:
    rules = plugins.load("models", TINY[case][0]).weights()(tiny(case)).rules
    names = [rule.megatron for rule in rules]
    assert len(names) == len(set(names))


PREDICTING: dict[str, tuple[str, str, int]] = {
    "qwen3_next": ("mtp.layers.0.self_attn.q_proj.weight", "model.layers.3.mlp.gate.weight", 1),
    "deepseek3": ("model.layers.3.mlp.experts.0.gate_proj.weight", "model.layers.2.mlp.gate.weight", 2),
    "deepseek32": ("model.layers.3.self_attn.indexer.wk.weight", "model.layers.2.mlp.gate.weight", 2),
    "glm5": ("model.layers.3.self_attn.indexer.wk.weight", "model.layers.2.self_attn.q_a_proj.weight", 2),
    "glm4_moe": ("model.layers.3.eh_proj.weight", "model.layers.30.mlp.gate.weight", 2),
    "mimo": ("model.mtp_layers.0.input_proj.weight", "model.layers.3.mlp.up_proj.weight", 2),
}
"""A tensor of a further layer, one that belongs to no such layer, and further layers that the family can have."""


@pytest.mark.parametrize("family", PREDICTING)
def test_further_layers_are_left_out_aloud_unless_they_train(family: str) -> None:
    from dataclasses import replace

    further, other, most = PREDICTING[family]
    config = tiny(family)
    weights = plugins.load("models", family).weights()
    (left_out,) = weights(config).left_out_hf
    assert re.fullmatch(left_out.hf, further)
    assert not re.fullmatch(left_out.hf, other)
    assert "--mtp-num-layers 1 trains them" in left_out.remedy
    assert not any("mtp." in rule.megatron for rule in weights(config).rules)
    for count in range(1, most + 1):
        table = weights(replace(config, mtp_num_layers=count))
        assert not any(re.fullmatch(one.hf, further) for one in table.left_out_hf)
        names = [rule.megatron for rule in table.rules]
        assert len(names) == len(set(names))
        assert sum(name.endswith("eh_proj.weight") for name in names) == count
        assert sum("mtp_model_layer.input_layernorm" in name for name in names) == count


@pytest.mark.parametrize("layout", ["stacked", "stacked_transposed"])
def test_stacked_experts_replace_the_rules_of_single_ones(layout: str) -> None:
    from dataclasses import replace

    from loongforge.core.model.weights import StackedExperts

    config = replace(tiny("qwen3_moe"), expert_layout=layout)
    rules = plugins.load("models", "qwen3_moe").weights()(config).rules
    found = {rule.megatron.rpartition("{expert}.")[2]: rule for rule in rules if "local_experts" in rule.megatron}
    assert all(isinstance(rule, StackedExperts) for rule in found.values())
    up, down = (found[f"linear_fc{number}.weight"] for number in (1, 2))
    assert (up.gate_up, up.shard_dim, down.gate_up, down.shard_dim) == (True, 0, False, 1)
    assert up.transposed is down.transposed is (layout == "stacked_transposed")
