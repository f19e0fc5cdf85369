"""Qwen3 with experts."""

from __future__ import annotations

from typing import Any


def config(layers: int, hidden: int, ffn: int, heads: int, groups: int, width: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
        **more,
    }


CODER = {
    "max_position_embeddings": 262144,
    "qkv_bias": False,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.0,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}


RELEASED: dict[str, dict[str, Any]] = {
    "qwen3_30b_a3b": config(48, 2048, 6144, 32, 4, 768, bos_token_id=151643),
    "qwen3_235b_a22b": config(94, 4096, 12288, 64, 4, 1536, bos_token_id=151643),
    "qwen3_coder_30b_a3b": config(48, 2048, 5472, 32, 4, 768, **CODER),
    "qwen3_coder_480b_a35b": config(62, 6144, 8192, 96, 8, 2560, num_experts=160, **CODER),
}

PARAMETERS = {
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "qwen3_coder_30b_a3b": 30_532_122_624,
    "qwen3_coder_480b_a35b": 480_154_875_392,
}
