"""LLaMA 2 (a key and value head for each query head), LLaMA 3, and LLaMA 3.1 with stretched frequencies."""

from __future__ import annotations

from typing import Any

from case import DENSE, Case

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 10,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 131,
}
STRETCH = {
    "factor": 4.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}

CASES = {
    "llama2": Case(family="llama", config={**CONFIG, "num_key_value_heads": 6}, layouts=("one", "tp2-sp")),
    "llama3": Case(family="llama", config=CONFIG, layouts=DENSE),
    "llama3_1": Case(
        family="llama", config={**CONFIG, "rope_scaling": STRETCH, "tie_word_embeddings": True}, layouts=("one", "cp2")
    ),
}
