"""The first Qwen, in its last revision."""

from __future__ import annotations

from typing import Any


def config(
    layers: int, hidden: int, both: int, heads: int, vocab: int, positions: int, length: int, **more: Any
) -> dict[str, Any]:
    """`both`: the widths of gate and up together."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "attn_dropout_prob": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": both,
        "kv_channels": 128,
        "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": positions,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": length,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": vocab,
        **more,
    }


RELEASED = {
    "qwen_1_8b": config(24, 2048, 11008, 16, 151936, 8192, 8192),
    "qwen_7b": config(32, 4096, 22016, 32, 151936, 32768, 8192),
    "qwen_14b": config(40, 5120, 27392, 40, 152064, 8192, 2048),
    "qwen_72b": config(
        80, 8192, 49152, 64, 152064, 32768, 32768, rotary_emb_base=1000000, use_dynamic_ntk=False, use_logn_attn=False
    ),
}
PARAMETERS = {
    "qwen_1_8b": 1_836_828_672,
    "qwen_7b": 7_721_324_544,
    "qwen_14b": 14_167_290_880,
    "qwen_72b": 72_287_920_128,
}
FREE = {"bf16", "fp16", "fp32", "onnx_safe", "tokenizer_class", "use_flash_attn"}
TRANSFORMERS = False
