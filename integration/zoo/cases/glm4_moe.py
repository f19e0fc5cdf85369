"""GLM-4.5: half of each head rotated, biases, with and without head norms, experts behind dense layers."""

from __future__ import annotations

from typing import Any

from case import EXPERTS, Case
from predicting import predicting

CONFIG: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [1, 2],
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 20,
    "n_group": 1,
    "n_routed_experts": 10,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 131,
}
STILL = ("--moe-router-bias-update-rate", "0")
"""The reference leaves the bias of the choice alone."""

CASES = {
    "glm_4_5": Case(family="glm4_moe", config=CONFIG, layouts=EXPERTS, flags=STILL),
    "glm_4_5_air": Case(
        family="glm4_moe",
        config={**CONFIG, "use_qk_norm": False},
        layouts=("one", "tp2-sp-ep2"),
        flags=STILL,
        # A bias of keys that no rotation turns shifts all scores of a query alike, which a softmax does not see.
        rounding=r".*k_proj\.bias",
    ),
    "glm_4_5 predicting": predicting(
        "AS_LAYERS",
        family="glm4_moe",
        config={**CONFIG, "num_nextn_predict_layers": 1},
        layouts=("one", "tp2-sp-ep2"),
        flags=STILL,
    ),
}
