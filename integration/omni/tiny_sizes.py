"""Overrides that make any released model tiny: every field that says how large something is, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loongforge.core.config.run import RunConfig

SIZES: Mapping[str, Mapping[str, str]] = {
    "image_encoder": {
        "num_layers": "3",
        "hidden_size": "32",
        "ffn_hidden_size": "44",
        "num_attention_heads": "4",
        "patch_size": "4",
        "position_embeddings": "36",
        "deepstack_layers": "[0,2]",
        "window_size": "16",
        "full_attention_layers": "[1]",
    },
    "image_projector": {},
    "foundation": {
        "num_layers": "4",
        "hidden_size": "48",
        "ffn_hidden_size": "80",
        "num_attention_heads": "4",
        "num_query_groups": "2",
        "kv_channels": "16",
        "vocab_size": "131",
        "max_position_embeddings": "128",
        "mrope_section": "[4,3,1]",
        "num_experts": "8",
        "moe_router_topk": "4",
        "moe_ffn_hidden_size": "24",
        "moe_shared_expert_intermediate_size": "24",
        "moe_router_num_groups": "4",
        "moe_router_group_topk": "2",
        "q_lora_rank": "20",
        "kv_lora_rank": "12",
        "qk_head_dim": "10",
        "qk_pos_emb_head_dim": "6",
        "v_head_dim": "14",
        "first_dense_layers": "1",
        "dsa_indexer_n_heads": "3",
        "dsa_indexer_head_dim": "12",
        "dsa_indexer_topk": "20",
    },
}
"""Fields of the families' configs, and their tiny values as an override writes them."""


def overrides(config: RunConfig) -> list[str]:
    """Overrides for every component of `config`; a field that is unset stays so, what begins or ends a text is gone."""
    found: list[str] = []
    for slot, component in config.model.components.items():
        for name, value in fields_of(component.geometry).items():
            if name in SIZES[slot] and value is not None:
                found.append(f"model.{slot}.{name}={SIZES[slot][name]}")
            elif name.endswith("_token_id"):
                found.append(f"model.{slot}.{name}=null")
    return found


def fields_of(geometry: Any) -> dict[str, Any]:
    """Fields of a family's config by name."""
    return {name: getattr(geometry, name) for name in geometry.__dataclass_fields__}
