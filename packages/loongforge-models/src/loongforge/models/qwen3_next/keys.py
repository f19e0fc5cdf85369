"""What Qwen3-Next makes of every key of its `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loongforge.models.parts.decoder import FIELDS, REQUIRED
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.rope import KEYS

LINEAR, FULL = "linear_attention", "full_attention"
INTERVAL = 4
"""Every layer of this number has attention where a file is silent; transformers' default."""
ROTATED = 0.25
"""Share of a head that is rotated where a file is silent; transformers' default."""

HF_KEYS = HFKeys(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    fields={
        **FIELDS,
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
        "linear_conv_kernel_dim": "linear_conv_kernel_dim",
        "linear_key_head_dim": "linear_key_head_dim",
        "linear_num_key_heads": "linear_num_key_heads",
        "linear_num_value_heads": "linear_num_value_heads",
        "linear_value_head_dim": "linear_value_head_dim",
        "num_experts": "num_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
        "router_aux_loss_coef": "moe_aux_loss_coeff",
    },
    required=(
        *(*REQUIRED, "num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads"),
        *("linear_key_head_dim", "linear_value_head_dim", "num_experts", "num_experts_per_tok"),
        *("moe_intermediate_size", "shared_expert_intermediate_size"),
    ),
    only={
        "attention_bias": (False, "no released Qwen3-Next has biases"),
        "decoder_sparse_step": (1, "every layer of a released Qwen3-Next has experts"),
        "hidden_act": ("silu", "the MLP of Qwen3-Next is SwiGLU"),
        "use_sliding_window": (False, "attention of a released Qwen3-Next reaches everything before it"),
    },
    ignored={"output_router_logits": "what transformers returns"},
    special=(
        *KEYS,
        *("full_attention_interval", "layer_types", "mlp_only_layers", "norm_topk_prob", "partial_rotary_factor"),
    ),
    aliases={"num_local_experts": "num_experts"},  # transformers 5
)
"""Every key that transformers or a released checkpoint writes."""


def attention_interval(hf: Mapping[str, Any]) -> Any:
    """Every layer of which number has attention; `wrong_layers` says whether the file is clear about it."""
    kinds, interval = hf.get("layer_types"), hf.get("full_attention_interval")
    if kinds and interval is None and FULL in kinds:
        return list(kinds).index(FULL) + 1
    return INTERVAL if interval is None else interval


def wrong_layers(hf: Mapping[str, Any]) -> list[str]:
    """Kinds of layers that are not the pattern of an interval, and layers without experts."""
    problems: list[str] = []
    if hf.get("mlp_only_layers"):
        problems.append(
            f"config.json: mlp_only_layers={hf['mlp_only_layers']!r} is not supported, only []. Every layer of a "
            "released Qwen3-Next has experts."
        )
    kinds, layers, interval = hf.get("layer_types"), hf.get("num_hidden_layers"), attention_interval(hf)
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
        return [*problems, f"config.json: full_attention_interval={interval!r} must be a whole number of at least 1."]
    if kinds is None or not isinstance(layers, int):
        return problems
    expected = [LINEAR if (layer + 1) % interval else FULL for layer in range(layers)]
    if list(kinds) != expected:
        problems.append(
            f"config.json: layer_types={list(kinds)!r} is not supported, only {layers} layers of {LINEAR!r} of which "
            f"each {interval}th is {FULL!r}."
        )
    return problems
