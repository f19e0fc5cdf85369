"""GLM-4.5 and GLM-4.5-Air."""

from __future__ import annotations

from typing import Any


def glm(**sizes: Any) -> dict[str, Any]:
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338],
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 131072,
        "model_type": "glm4_moe",
        "n_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "pad_token_id": 151329,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_cache": True,
        "vocab_size": 151552,
        **sizes,
    }


RELEASED = {
    "glm_4_5_355b_a32b": glm(
        first_k_dense_replace=3,
        hidden_size=5120,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        n_routed_experts=160,
        num_hidden_layers=92,
        routed_scaling_factor=2.5,
        use_qk_norm=True,
    ),
    "glm_4_5_air_106b_a12b": glm(
        first_k_dense_replace=1,
        hidden_size=4096,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=128,
        num_hidden_layers=46,
        routed_scaling_factor=1.0,
        use_qk_norm=False,
    ),
}

PARAMETERS = {"glm_4_5_355b_a32b": 352_797_814_784, "glm_4_5_air_106b_a12b": 106_852_245_504}
EXPECTED = {"num_nextn_predict_layers": 0}
