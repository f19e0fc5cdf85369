"""MiMo: Qwen2's layers, and further ones whose projection takes the hidden state first."""

from __future__ import annotations

from typing import Any

from case import DENSE
from predicting import predicting

CONFIG: dict[str, Any] = {
    "architectures": ["MiMoForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "model_type": "mimo",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 131,
}

CASES = {"mimo": predicting("MIMO", family="mimo", config=CONFIG, layouts=DENSE, depths=2)}
