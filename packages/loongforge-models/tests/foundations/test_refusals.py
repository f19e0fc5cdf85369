"""What a family cannot train is an error that names key, value and way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from released import SIZES

from loongforge.core import plugins
from loongforge.core.errors import ConfigError

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

CASES: list[tuple[str, str, dict[str, Any], str]] = [
    ("qwen2", "qwen2_5_7b", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ("qwen2", "qwen2_5_7b", {"use_mrope": True}, "use_mrope=True is not supported.*Qwen2.5-VL"),
    ("qwen2", "qwen2_5_7b", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported"),
    (
        "qwen2",
        "qwen2_5_7b",
        {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 25]}},
        r"mrope_section=\(16, 24, 25\) must be three counts .* add up to kv_channels / 2 = 64",
    ),
    ("mimo", "mimo_7b", {"use_mrope": True}, "use_mrope=True is not supported.*MiMo-VL"),
    ("mimo", "mimo_7b", {"attention_bias": False}, "attention_bias=False is not supported"),
    ("mimo", "mimo_7b", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1 must be a whole number"),
    ("qwen2", "qwen2_5_7b", {"num_attention_heads": None}, "'num_attention_heads' is missing"),
    ("qwen", "qwen_7b", {"visual": {"layers": 48}}, "visual=.* is not supported.*Qwen-VL"),
    ("qwen", "qwen_7b", {"no_bias": False}, "no_bias=False is not supported"),
    ("qwen", "qwen_7b", {"intermediate_size": 11009}, "intermediate_size=11009 must be even"),
    ("qwen", "qwen_7b", {"kv_channels": 64}, "kv_channels=64 is not supported, only .* = 128"),
    ("internlm2", "internlm2_5_7b", {"bias": True}, "bias=True is not supported"),
    ("internlm2", "internlm2_5_7b", {"rope_scaling": {"type": "dynamic"}}, "lacks 'factor'"),
    ("internlm2", "internlm2_5_7b", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'default' and 'dynamic'"),
    ("internlm2", "internlm2_5_7b", {"hidden_size": 4100}, "hidden_size=4100 must be a multiple of 2 x"),
    ("llama", "llama3_8b", {"attention_bias": True}, "attention_bias=True is not supported"),
    ("llama", "llama3_8b", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
    ("llama", "llama3_8b", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "only 'default' and 'llama3'"),
    ("llama", "llama3_8b", {"rope_parameters": {"rope_theta": 1.0, "rope_type": "default"}}, "contradicts"),
    ("llama", "llama3_8b", {"num_key_value_heads": 7}, "must be a multiple of num_query_groups=7"),
    ("qwen3_moe", "qwen3_30b_a3b", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
    ("qwen3_moe", "qwen3_30b_a3b", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
    ("qwen3_moe", "qwen3_30b_a3b", {"shared_expert_intermediate_size": 64}, "has a shared expert"),
    ("qwen3_moe", "qwen3_30b_a3b", {"num_experts_per_tok": 129}, "moe_router_topk=129 must not exceed num_experts=128"),
    ("qwen3_moe", "qwen3_30b_a3b", {"moe_intermediate_size": 0}, "moe_ffn_hidden_size must be a whole number"),
    ("qwen3_next", "qwen3_next_80b_a3b", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
    ("qwen3_next", "qwen3_next_80b_a3b", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
    ("qwen3_next", "qwen3_next_80b_a3b", {"layer_types": ["full_attention"] * 48}, "each 4th is 'full_attention'"),
    ("qwen3_next", "qwen3_next_80b_a3b", {"full_attention_interval": 0}, "must be a whole number of at least 1"),
    ("qwen3_next", "qwen3_next_80b_a3b", {"full_attention_interval": 49}, "linear_attention_freq=49 must be between"),
    (
        "qwen3_next",
        "qwen3_next_80b_a3b",
        {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.25 contradicts the 0.5",
    ),
    ("qwen3_next", "qwen3_next_80b_a3b", {"linear_num_key_heads": 12}, "must be a multiple of linear_num_key_heads=12"),
    ("qwen3_next", "qwen3_next_80b_a3b", {"linear_num_value_heads": None}, "'linear_num_value_heads' is missing"),
    ("qwen3_moe", "qwen3_30b_a3b", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "only 1.0"),
    (
        "deepseek3",
        "deepseek_v3",
        {"quantization_config": {"quant_method": "awq"}},
        "quant_method='awq' is not supported",
    ),
    ("deepseek3", "deepseek_v3", {"quantization_config": {**FP8, "fmt": "e5m2"}}, "fmt='e5m2' is not supported"),
    (
        "llama",
        "llama3_8b",
        {"quantization_config": {**FP8, "weight_block_size": None}},
        "weight_block_size=None is not",
    ),
    ("qwen2", "qwen2_5_7b", {"quantization_config": {**FP8, "bits": 4}}, "bits=4 is not supported"),
    ("glm4_moe", "glm_4_5_air_106b_a12b", {"quantization_config": "fp8"}, "must be an object, got 'fp8'"),
    ("deepseek3", "deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
    ("deepseek3", "deepseek_v3", {"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers='1' must be a whole"),
    ("deepseek3", "deepseek_v3", {"num_key_value_heads": 8}, "num_key_value_heads=8 is not supported, only 128"),
    ("deepseek3", "deepseek_v3", {"qk_head_dim": 128}, "qk_head_dim=128 is not supported, only 192"),
    ("deepseek3", "deepseek_v3", {"topk_group": None}, "give both or neither"),
    ("deepseek3", "deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0}}, "one of mscale"),
    ("deepseek3", "deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob=False is not supported"),
    ("deepseek32", "deepseek_v3_2", {"index_topk": None}, "'index_topk' is missing"),
    ("deepseek32", "deepseek_v3_2", {"q_lora_rank": None}, "'q_lora_rank' is missing"),
    ("deepseek32", "deepseek_v3_2", {"layer_types": ["full_attention"] * 61}, "layer_types=.* is not supported"),
    ("deepseek32", "deepseek_v3_2", {"mlp_layer_types": ["sparse"] * 61}, "mlp_layer_types=.* is not supported"),
    ("glm5", "glm_5", {"indexer_rope_interleave": False}, "indexer_rope_interleave=False is not supported, only True"),
    (
        "glm5",
        "glm_5",
        {"index_topk_frequency": 4},
        "unknown key 'index_topk_frequency' .* Did you mean 'index_topk_freq'",
    ),
    ("glm5", "glm_5_2", {"indexer_types": ["full"] * 77}, "indexer_types=.* for each of the 78 layers"),
    ("glm5", "glm_5", {"index_topk_pattern": "FX" * 39}, "index_topk_pattern='FX.* must say 'full' or 'shared'"),
    ("glm5", "glm_5", {"indexer_types": ["shared"] + ["full"] * 77}, "must be letters F and S beginning with F"),
    ("deepseek2", "deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported"),
    ("deepseek2", "deepseek_v2", {"topk_method": "greedy"}, "only 'group_limited_greedy'"),
    ("deepseek2", "deepseek_v2_lite", {"topk_method": "group_limited_greedy"}, "only 'greedy'"),
    ("deepseek2", "deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
    ("glm4_moe", "glm_4_5_air_106b_a12b", {"first_k_dense_replace": 47}, "first_dense_layers=47 must not exceed"),
    ("glm4_moe", "glm_4_5_air_106b_a12b", {"n_group": 2}, "n_group=2 is not supported"),
    ("glm4_moe", "glm_4_5_air_106b_a12b", {"num_experts_per_tok": 129}, "must not exceed num_experts=128"),
    ("deepseek3", "kimi_k2", {"aux_loss_alpha": -1.0}, "moe_aux_loss_coeff must be a number of at least 0, got -1.0"),
    ("deepseek3", "kimi_k2", {"seq_aux": "yes"}, "seq_aux='yes' must be true or false"),
    ("minimax_m2", "minimax_m2_230b_a10b", {"rotary_dim": 63}, "= 63 must be an even whole number"),
    (
        "minimax_m2",
        "minimax_m2_230b_a10b",
        {"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.25}},
        "rotary_dim=64 contradicts the share 0.25 of head_dim=128",
    ),
    ("minimax_m2", "minimax_m2_230b_a10b", {"attn_type_list": [1, 0]}, r"attn_type_list=\[1, 0\] is not supported"),
    ("minimax_m2", "minimax_m2_230b_a10b", {"qk_norm_type": "per_head"}, "qk_norm_type='per_head' is not supported"),
    ("minimax_m2", "minimax_m2_230b_a10b", {"shared_intermediate_size": 64}, "has a shared expert"),
]


@pytest.mark.parametrize(("family", "size", "change", "text"), CASES)
def test_refusals(family: str, size: str, change: dict[str, Any], text: str, released: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match=text):
        plugins.load("models", family).config().from_hf({**released[size], **change})


@pytest.mark.parametrize(("family", "size"), dict(reversed(SIZES)).items())
def test_an_unknown_key_is_named(family: str, size: str, released: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'hidden_sise'.*Did you mean 'hidden_size'"):
        plugins.load("models", family).config().from_hf({**released[size], "hidden_sise": 1})


@pytest.mark.parametrize(("family", "size"), dict(reversed(SIZES)).items())
def test_fp8_in_blocks_is_the_same_model(family: str, size: str, released: Mapping[str, Any]) -> None:
    kind = plugins.load("models", family).config()
    config = kind.from_hf({**released[size], "quantization_config": FP8})
    assert config == kind.from_hf(released[size])
    assert "quantization_config" not in config.to_hf()


FIELDS: list[tuple[str, str, dict[str, Any], str]] = [
    ("llama", "llama3_1_8b", {"low_freq_factor": 5.0}, "low_freq_factor=5.0 must be below high_freq_factor=4.0"),
    ("qwen3_moe", "qwen3_30b_a3b", {"mrope_interleaved": True}, "needs a mrope_section"),
    ("qwen3_moe", "qwen3_30b_a3b", {"moe_aux_loss_coeff": -1.0}, "must be a number of at least 0, got -1.0"),
    ("qwen3_next", "qwen3_next_80b_a3b", {"rotary_percent": 0.0}, "rotary_percent must be above 0 and at most 1"),
    ("qwen3_next", "qwen3_next_80b_a3b", {"rotary_percent": 0.3}, "= 76.8 must be an even whole number"),
    ("deepseek3", "deepseek_v3", {"first_dense_layers": 62}, "first_dense_layers=62 must not exceed num_layers=61"),
    ("deepseek3", "deepseek_v3", {"moe_shared_expert_intermediate_size": 99}, "must be a multiple of"),
    ("deepseek3", "deepseek_v3", {"qk_pos_emb_head_dim": 63}, "qk_pos_emb_head_dim=63 must be even"),
    ("minimax_m2", "minimax_m2_230b_a10b", {"num_query_groups": 7}, "must be a multiple of num_query_groups=7"),
    (
        "glm4_moe",
        "glm_4_5_air_106b_a12b",
        {"moe_router_load_balancing_type": "sinkhorn"},
        "must be one of aux_loss, seq_aux_loss, global_aux_loss, none, got 'sinkhorn'",
    ),
    ("deepseek3", "deepseek_v3", {"mtp_num_layers": -1}, "mtp_num_layers must be a whole number of at least 0, got -1"),
    ("mimo", "mimo_7b", {"mtp_loss_scaling_factor": -0.1}, "must be a number of at least 0, got -0.1"),
    ("qwen3_next", "qwen3_next_80b_a3b", {"mtp_num_layers": 2}, "mtp_num_layers=2 must be 0 or 1"),
    ("deepseek32", "deepseek_v3_2", {"dsa_indexer_topk": 0}, "dsa_indexer_topk must be a whole number of at least 1"),
    ("deepseek32", "deepseek_v3_2", {"dsa_indexer_loss_coeff": -1.0}, "dsa_indexer_loss_coeff must be a number of at"),
    (
        "deepseek32",
        "deepseek_v3_2",
        {"dsa_route": "dense"},
        "dsa_route must be one of auto, masked, gather, got 'dense'",
    ),
    ("deepseek32", "deepseek_v3_2", {"dsa_indexer_warmup": 1}, "dsa_indexer_warmup must be true or false, got 1"),
    (
        "deepseek32",
        "deepseek_v3_2",
        {"dsa_indexer_fp8": True, "dsa_indexer_head_dim": 64},
        "dsa_indexer_fp8=True rotates index heads of 128 channels, and dsa_indexer_head_dim=64: leave it out",
    ),
    ("deepseek32", "deepseek_v3_2", {"dsa_indexer_head_dim": 63}, "must be at least qk_pos_emb_head_dim=64"),
    ("deepseek32", "deepseek_v3_2", {"attention_dropout": 0.1}, "attention_dropout=0.1 must be 0"),
    ("deepseek32", "deepseek_v3_2", {"q_lora_rank": None}, "q_lora_rank must be a number"),
    ("glm5", "glm_5", {"dsa_indexer_topk_freq": 0}, "dsa_indexer_topk_freq must be a whole number of at least 1"),
    ("glm5", "glm_5", {"dsa_indexer_pattern": "FSF"}, "dsa_indexer_pattern has 3 letters for num_layers=78"),
    ("glm5", "glm_5_2", {"dsa_indexer_pattern": "FS" * 39}, "both say which layers have an indexer: give one"),
    ("deepseek2", "deepseek_v2", {"mtp_num_layers": 1}, "mtp_num_layers=1 must be 0"),
    ("deepseek3", "deepseek_v3", {"q_lora_rank": 0}, "q_lora_rank must be a whole number of at least 1, got 0"),
]


@pytest.mark.parametrize(("family", "size", "change", "text"), FIELDS)
def test_impossible_fields(
    family: str, size: str, change: dict[str, Any], text: str, released: Mapping[str, Any]
) -> None:
    config = plugins.load("models", family).config().from_hf(released[size])
    with pytest.raises(ConfigError, match=text):
        replace(config, **change)


def test_two_spellings_of_the_positions_may_agree(released: Mapping[str, Any]) -> None:
    """As in an export over a `config.json` of transformers 5."""
    hf = released["llama3_1_8b"]
    kind = plugins.load("models", "llama").config()
    newer = {**hf["rope_scaling"], "rope_theta": hf["rope_theta"]}
    assert kind.from_hf({**hf, "rope_parameters": newer}) == kind.from_hf(hf)
    with pytest.raises(ConfigError, match="rope_parameters contradicts rope_scaling"):
        kind.from_hf({**hf, "rope_parameters": {**newer, "factor": 9.0}})
