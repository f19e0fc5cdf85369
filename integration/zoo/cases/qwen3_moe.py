"""Qwen3 with experts: a softmax over all, the chosen ones' weights made to sum to one, and their share among all."""

from __future__ import annotations

from typing import Any

from case import EXPERTS, Case

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "decoder_sparse_step": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "max_window_layers": 4,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 131,
}

CASES = {
    "qwen3_moe": Case(family="qwen3_moe", config=CONFIG, layouts=(*EXPERTS, "pp2-vpp2")),
    "qwen3_moe share of all": Case(
        family="qwen3_moe", config={**CONFIG, "norm_topk_prob": False}, layouts=("one", "tp2-sp-ep2")
    ),
}
