"""Qwen3-Next: gated delta rules, gated attention with a quarter of a head rotated, a gated shared expert.

A gated delta rule normalises what a head reads, however little that is: where a query meets no key, rounding decides
the result. The epsilon is therefore large here, and the norms about one are moderate, so that a tiny model is no more
sensitive than others: changing its weights by 1e-7 moves its logits by 2e-6 (with 1e-6 in its place by 1e-4).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from case import Case
from predicting import predicting

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "decoder_sparse_step": 1,
    "eos_token_id": 2,
    "full_attention_interval": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "linear_conv_kernel_dim": 5,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_value_head_dim": 12,
    "max_position_embeddings": 64,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 6,  # a whole period and half of the next
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-3,
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.0,
    "shared_expert_intermediate_size": 28,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 131,
}

LAYOUTS = ("one", "tp2-sp", "pp2", "ep2", "tp2-sp-ep2")


def write(config: dict[str, Any], directory: Path, seed: int) -> None:
    """Random weights; those of norms that multiply by 1 + weight about 0, and memories long enough to matter."""
    import torch
    from reference import randomise
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and "linear_attn" not in name:
                parameter -= 1
            if name.endswith("A_log"):
                parameter.uniform_(-3, 0)
    model.save_pretrained(directory, max_shard_size="100KB")
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def case(layouts: tuple[str, ...], **changes: Any) -> Case:
    """The tiny model, with changes."""
    config = {**CONFIG, **changes}
    return Case(family="qwen3_next", config=config, layouts=layouts, write=partial(write, config))


CASES = {
    "qwen3_next": case(LAYOUTS),
    # One key/value head for two tensor parallel ranks: each finds its own queries and gates in the gathered rows.
    "qwen3_next predicting": predicting(
        "QWEN3_NEXT", family="qwen3_next", config=CONFIG, layouts=("one", "pp2", "tp2-sp-ep2")
    ),
    "qwen3_next one group": case(("one", "tp2-sp"), num_key_value_heads=1),
}
