"""LLaMA 2, 3, 3.1 and 3.2."""

from __future__ import annotations

from typing import Any


def config(
    layers: int, hidden: int, ffn: int, heads: int, positions: int, factor: float | None = None, **more: Any
) -> dict[str, Any]:
    scaling = {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": scaling if factor else None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 128256,
        **more,
    }


def llama2(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> dict[str, Any]:
    """A file without rope_theta, which is 10000 then."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 32000,
    }


RELEASED: dict[str, dict[str, Any]] = {
    "llama2_7b": llama2(32, 4096, 11008, 32, 32),
    "llama2_13b": llama2(40, 5120, 13824, 40, 40),
    "llama2_70b": llama2(80, 8192, 28672, 64, 8),
    "llama3_8b": config(32, 4096, 14336, 32, 8192),
    "llama3_70b": config(80, 8192, 28672, 64, 8192),
    "llama3_1_8b": config(32, 4096, 14336, 32, 131072, 8.0),
    "llama3_1_70b": config(80, 8192, 28672, 64, 131072, 8.0),
    "llama3_1_405b": config(126, 16384, 53248, 128, 131072, 8.0),
    "llama3_2_1b": config(16, 2048, 8192, 32, 131072, 32.0, tie_word_embeddings=True, head_dim=64),
    "llama3_2_3b": config(28, 3072, 8192, 24, 131072, 32.0, tie_word_embeddings=True, head_dim=128),
}

PARAMETERS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
}
