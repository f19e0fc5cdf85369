"""GLM-5.2: sparse attention whose indexer turns neighbouring channels, and layers that share its choice."""

from __future__ import annotations

from typing import Any

from case import Case

CONFIG: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "head_dim": 18,  # as releases have it: without effect
    "hidden_act": "silu",
    "hidden_size": 48,
    "index_head_dim": 10,
    "index_n_heads": 11,  # so many that hardly a score is exactly 0: transformers breaks such ties by chance
    "index_share_for_mtp_iteration": True,
    "index_skip_topk_offset": 1,
    "index_topk": 9,  # of 32 tokens
    "index_topk_freq": 3,
    "index_topk_pattern": None,
    "indexer_rope_interleave": True,
    "indexer_types": ["full", "shared", "shared", "full"],
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "kv_lora_rank": 14,
    "max_position_embeddings": 64,
    "model_type": "glm_moe_dsa",
    "moe_intermediate_size": 20,  # transformers multiplies experts in blocks of 16 bytes
    "moe_layer_freq": 1,
    "moe_router_dtype": "float32",
    "n_group": 1,
    "n_routed_experts": 10,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 6,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "q_lora_rank": 26,
    "qk_head_dim": 24,
    "qk_nope_head_dim": 18,
    "qk_rope_head_dim": 6,
    "rms_norm_eps": 1e-5,  # the two latent norms have 1e-6 whatever this says
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "use_cache": True,
    "v_head_dim": 16,
    "vocab_size": 131,
}
STILL = ("--moe-router-bias-update-rate", "0")
"""The reference leaves the bias of the choice alone."""

CASES = {"glm_moe_dsa": Case(family="glm5", config=CONFIG, layouts=("one", "tp2-sp", "cp2"), flags=STILL)}
