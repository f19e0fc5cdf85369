"""InternLM2.5."""

from __future__ import annotations

from typing import Any


def config(layers: int, hidden: int, ffn: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "eager",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 32768,
        "model_type": "internlm2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 92544,
    }


RELEASED = {
    "internlm2_5_1_8b": config(24, 2048, 8192, 16),
    "internlm2_5_7b": config(32, 4096, 14336, 32),
    "internlm2_5_20b": config(48, 6144, 16384, 48),
}
PARAMETERS = {
    "internlm2_5_1_8b": 1_889_110_016,
    "internlm2_5_7b": 7_737_708_544,
    "internlm2_5_20b": 19_861_149_696,
}
FREE = {"attn_implementation", "pretraining_tp"}
TRANSFORMERS = False
