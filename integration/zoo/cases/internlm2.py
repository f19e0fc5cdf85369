"""InternLM2.5: query, key and value in one matrix, group by group; the stretch of long sequences is not reached."""

from __future__ import annotations

from typing import Any

from case import DENSE, Case
from plain import InternLM2, reader, writer

CONFIG: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    },
    "attention_dropout": 0.0,
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "model_type": "internlm2",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 131,
}

CASES = {
    "internlm2_5": Case(
        family="internlm2", config=CONFIG, layouts=DENSE, write=writer(InternLM2, CONFIG), reference=reader(InternLM2)
    ),
}
