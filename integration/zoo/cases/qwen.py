"""The first Qwen: no shared key and value heads, biases of query, key and value, names of its own."""

from __future__ import annotations

from typing import Any

from case import DENSE, Case
from plain import Qwen, reader, writer

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "emb_dropout_prob": 0.0,
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "kv_channels": 8,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 128,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "onnx_safe": None,
    "rotary_emb_base": 10000.0,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 64,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "torch_dtype": "float32",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 131,
}

CASES = {
    "qwen": Case(family="qwen", config=CONFIG, layouts=DENSE, write=writer(Qwen, CONFIG), reference=reader(Qwen)),
}
