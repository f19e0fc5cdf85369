"""DeepSeek-V2, V2-Lite, V3 and V3.2: latent attention, dense layers in front, experts in groups and a shared one."""

from __future__ import annotations

from typing import Any

from case import EXPERTS, Case
from predicting import predicting

SHARED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "kv_lora_rank": 14,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 20,  # transformers multiplies experts in blocks of 16 bytes
    "moe_layer_freq": 1,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 6,
    "qk_nope_head_dim": 18,
    "qk_rope_head_dim": 6,
    "rms_norm_eps": 1e-5,  # the two latent norms have 1e-6 whatever this says
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 4.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 16,
        "type": "yarn",
    },
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "v_head_dim": 16,
    "vocab_size": 131,
}
V2: dict[str, Any] = {
    **SHARED,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "n_group": 8,
    "n_routed_experts": 24,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "q_lora_rank": 26,
    "routed_scaling_factor": 4.0,
    "scoring_func": "softmax",
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
LITE = {**V2, "n_group": 1, "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_group": 1, "topk_method": "greedy"}
V3: dict[str, Any] = {
    **SHARED,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 6,  # not twice topk_group: a group's score is that of its two best whatever is chosen
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 26,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 2,
    "topk_method": "noaux_tc",
}

V32: dict[str, Any] = {
    **V3,
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_head_dim": 10,
    "index_n_heads": 11,  # so many that hardly a score is exactly 0: transformers breaks such ties by chance
    "index_topk": 9,  # of 32 tokens
    "model_type": "deepseek_v32",
}

STILL = ("--moe-router-bias-update-rate", "0")
"""The reference leaves the bias of the choice alone."""

CASES = {
    "deepseek_v2": Case(family="deepseek2", config=V2, layouts=EXPERTS),
    "deepseek_v2_lite": Case(family="deepseek2", config=LITE, layouts=("one", "tp2-sp", "ep2")),
    "deepseek_v3": Case(
        family="deepseek3",
        config=V3,
        layouts=EXPERTS,
        flags=STILL,
    ),
    "deepseek_v32": Case(family="deepseek32", config=V32, layouts=("one", "tp2-sp", "cp2"), flags=STILL),
    "deepseek_v3 predicting": predicting(
        "AS_LAYERS",
        family="deepseek3",
        config={**V3, "num_nextn_predict_layers": 1},
        layouts=EXPERTS,
        flags=STILL,
    ),
}

FURTHER = {
    "deepseek_v32 fp8": Case(
        family="deepseek32",
        config={**V32, "index_head_dim": 128},  # of the heads that are rotated
        layouts=("one",),
        flags=(*STILL, "--dsa-indexer-fp8"),
    ),
    "deepseek_v32 predicting": predicting(
        "AS_LAYERS",
        family="deepseek32",
        config={**V32, "num_nextn_predict_layers": 1},
        layouts=("one",),
        flags=STILL,
    ),
}
