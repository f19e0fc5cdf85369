"""Qwen1.5, Qwen2 and Qwen2.5: biases of query, key and value; tied and not."""

from __future__ import annotations

from typing import Any

from case import DENSE, Case

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "max_window_layers": 4,
    "model_type": "qwen2",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 131,
}

CASES = {
    "qwen1_5": Case(family="qwen2", config={**CONFIG, "num_key_value_heads": 6}, layouts=("one", "tp2-sp")),
    "qwen2": Case(family="qwen2", config={**CONFIG, "tie_word_embeddings": True}, layouts=("one", "tp2-sp", "pp2")),
    "qwen2_5": Case(family="qwen2", config=CONFIG, layouts=DENSE),
}
