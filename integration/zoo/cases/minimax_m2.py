"""MiniMax-M2: norms over all heads of query and key, part of each head rotated, experts in every layer."""

from __future__ import annotations

from case import EXPERTS, Case

CASES = {
    "minimax_m2": Case(
        family="minimax_m2",
        config={
            "architectures": ["MiniMaxM2ForCausalLM"],
            "attention_dropout": 0.0,
            "attn_type_list": [1, 1, 1, 1],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 16,
            "hidden_act": "silu",
            "hidden_size": 48,
            "initializer_range": 0.02,
            "intermediate_size": 20,
            "max_position_embeddings": 64,
            "model_type": "minimax_m2",
            "num_attention_heads": 6,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 10,
            "output_router_logits": False,
            "qk_norm_type": "per_layer",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rotary_dim": 8,
            "router_aux_loss_coef": 0.0,
            "router_jitter_noise": 0.0,
            "scoring_func": "sigmoid",
            "shared_intermediate_size": 0,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_cache": True,
            "use_mtp": False,
            "use_qk_norm": True,
            "use_routing_bias": True,
            "vocab_size": 131,
        },
        layouts=EXPERTS,
        flags=("--moe-router-bias-update-rate", "0"),  # the reference leaves the bias of the choice alone
    )
}
