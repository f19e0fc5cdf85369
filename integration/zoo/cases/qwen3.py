"""Dense Qwen3: norms of query and key heads, head width apart from the hidden size."""

from __future__ import annotations

from typing import Any

from case import DENSE, Case

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "max_window_layers": 4,
    "model_type": "qwen3",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 131,
}

CASES = {
    "qwen3": Case(family="qwen3", config=CONFIG, layouts=DENSE),
    "qwen3 tied": Case(
        family="qwen3", config={**CONFIG, "tie_word_embeddings": True}, layouts=("one", "tp2-sp", "pp2")
    ),
}
