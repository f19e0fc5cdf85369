"""Every family through the whole check: built, loaded, saved, split, resumed, and equal to transformers."""

from __future__ import annotations

from typing import Any

import pytest
from released import FAMILIES

from loongforge.core.testing.conformance import check_family

# transformers multiplies experts in groups, whose rows must be multiples of 16 bytes: 20 and not 22.
EXPERTS: dict[str, Any] = {
    "num_experts": 12,
    "moe_router_topk": 4,
    "moe_ffn_hidden_size": 20,
    "moe_aux_loss_coeff": 0.0,  # transformers leaves it out of the loss unless asked
}
ONLY_EXPERTS = {name: value for name, value in EXPERTS.items() if name != "moe_ffn_hidden_size"}
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "moe_shared_expert_intermediate_size": 28,
    "norm_epsilon": 1e-3,  # what a head reads is normalised however little it is: rounding would decide it
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 28,
    "kv_lora_rank": 12,
    "qk_head_dim": 18,
    "qk_pos_emb_head_dim": 6,
    "v_head_dim": 16,
    "first_dense_layers": 1,
    "moe_shared_expert_intermediate_size": 40,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "rotary_scaling_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DIRECT = {
    **LATENT,
    "q_lora_rank": None,
    "first_dense_layers": 0,
    "rotary_scaling_factor": 1.0,
    "original_max_position_embeddings": 4096,  # no effect and no place in `config.json` without YaRN
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tiny"),
    [
        ("qwen", {}),
        ("internlm2", {}),
        ("qwen2", {}),
        ("llama", {"original_max_position_embeddings": 16}),  # so that the stretch reaches the tiny frequencies
        ("qwen3_moe", EXPERTS),
        ("qwen3_next", {**EXPERTS, **DELTA}),
        ("glm4_moe", {**EXPERTS, "first_dense_layers": 1, "moe_shared_expert_intermediate_size": 20}),
        ("deepseek2", {**EXPERTS, **LATENT}),
        ("minimax_m2", {**ONLY_EXPERTS, "ffn_hidden_size": 20}),
        ("deepseek3", {**EXPERTS, **LATENT}),
        ("deepseek3", {**EXPERTS, **DIRECT}),
    ],
)
def test_family_conforms(family: str, tiny: dict[str, Any]) -> None:
    report = check_family(family, tiny=tiny)
    # integration/zoo has a reference of its own for families without a class of transformers.
    assert [one.check for one in report.skipped] == ([] if FAMILIES[family].transformers else ["transformers"])


@pytest.mark.slow
def test_mimo_conforms_with_further_layers() -> None:
    """transformers has no class of it; integration/zoo has the reference."""
    report = check_family("mimo", tiny={"mtp_num_layers": 2})
    assert [one.check for one in report.skipped] == ["transformers"]
