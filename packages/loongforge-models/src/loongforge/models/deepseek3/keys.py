"""What DeepSeek-V3 makes of every key of its `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loongforge.models.parts.decoder import FIELDS, REQUIRED
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.rope import KEYS

YARN = {
    "factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
"""Parameters of the `yarn` scaling and our names of them."""

YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
"""What transformers takes where a file is silent."""

BALANCING = {True: "seq_aux_loss", False: "aux_loss"}
"""Over which tokens the loss of `aux_loss_alpha` counts, by `seq_aux`."""

HF_KEYS = HFKeys(
    model_type="deepseek_v3",
    also=("kimi_k2",),
    architecture="DeepseekV3ForCausalLM",
    fields={
        **FIELDS,
        "kv_lora_rank": "kv_lora_rank",
        "qk_nope_head_dim": "qk_head_dim",
        "qk_rope_head_dim": "qk_pos_emb_head_dim",
        "v_head_dim": "v_head_dim",
        "first_k_dense_replace": "first_dense_layers",
        "n_routed_experts": "num_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "routed_scaling_factor": "moe_router_topk_scaling_factor",
    },
    required=(
        *REQUIRED,
        *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace"),
        *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor"),
    ),
    only={
        "attention_bias": (False, "no released DeepSeek-V3 has biases"),
        "hidden_act": ("silu", "the MLP of DeepSeek-V3 is SwiGLU"),
        "moe_layer_freq": (1, "every layer after the dense ones has experts"),
        "norm_topk_prob": (True, "sigmoid routing makes the weights of the chosen experts sum to one"),
        "rope_interleave": (True, "the rotation pairs neighbouring channels"),
        "scoring_func": ("sigmoid", "DeepSeek-V3 routes by sigmoid"),
        "topk_method": ("noaux_tc", "DeepSeek-V3 chooses groups by their two best experts, with a bias"),
    },
    ignored={
        "auto_map": "code that comes with the weights; the architecture is known here",
        "ep_size": "a layout, not the model",
        "output_router_logits": "what transformers returns",
        "pretraining_tp": "how transformers splits its matrices; same result",
    },
    special=(
        *KEYS,
        *("head_dim", "n_group", "n_shared_experts", "num_key_value_heads", "num_nextn_predict_layers"),
        *("q_lora_rank", "qk_head_dim", "topk_group", "aux_loss_alpha", "seq_aux"),
    ),
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
)
"""Every key that transformers or a released checkpoint writes."""


def wrong_attention_keys(hf: Mapping[str, Any]) -> list[str]:
    """Sizes that a file says twice must agree; latent attention has as many keys as queries."""
    rope, plain = hf.get("qk_rope_head_dim"), hf.get("qk_nope_head_dim")
    both = rope + plain if isinstance(rope, int) and isinstance(plain, int) else None
    expected = {"num_key_value_heads": hf.get("num_attention_heads"), "head_dim": rope, "qk_head_dim": both}
    return [
        f"config.json: {key}={hf[key]!r} is not supported, only {value!r}: it follows from the other sizes."
        for key, value in expected.items()
        if hf.get(key) is not None and value is not None and hf[key] != value
    ]


def wrong_yarn(parameters: Mapping[str, Any]) -> list[str]:
    """transformers looks at the two amplitudes together, or at neither."""
    if ("mscale" in parameters) == ("mscale_all_dim" in parameters):
        return []
    return [
        "config.json: the yarn scaling of the positions has one of mscale and mscale_all_dim; give both or neither."
    ]


def fixed_keys() -> dict[str, Any]:
    """Keys with one value in every file that we write."""
    return {
        "attention_bias": False,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
