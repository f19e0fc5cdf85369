"""DeepSeek-V2 and V2-Lite; the Chat releases say the same."""

from __future__ import annotations

from typing import Any


def deepseek2(mscale: float, **sizes: Any) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        "aux_loss_alpha": 0.001,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v2",
        "moe_layer_freq": 1,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_experts_per_tok": 6,
        "pretraining_tp": 1,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": mscale,
            "mscale_all_dim": mscale,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": 102400,
        **sizes,
    }


RELEASED = {
    "deepseek_v2": deepseek2(
        1.0,
        hidden_size=5120,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        n_group=8,
        n_routed_experts=160,
        num_attention_heads=128,
        num_hidden_layers=60,
        num_key_value_heads=128,
        q_lora_rank=1536,
        routed_scaling_factor=16.0,
        topk_group=3,
        topk_method="group_limited_greedy",
    ),
    "deepseek_v2_lite": deepseek2(
        0.707,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_group=1,
        n_routed_experts=64,
        num_attention_heads=16,
        num_hidden_layers=27,
        num_key_value_heads=16,
        q_lora_rank=None,
        routed_scaling_factor=1.0,
        topk_group=1,
        topk_method="greedy",
    ),
}

PARAMETERS = {"deepseek_v2": 235_741_434_880, "deepseek_v2_lite": 15_706_484_224}

FREE = ("auto_map", "pretraining_tp")
