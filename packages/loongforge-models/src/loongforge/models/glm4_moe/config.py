"""The geometry of a GLM-4.5 model, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loongforge.core.model.geometry import ExpertGeometry, LoadBalancing
from loongforge.models.parts.checks import (
    wrong_balancing,
    wrong_counts,
    wrong_experts,
    wrong_groups,
    wrong_numbers,
    wrong_rates,
    wrong_rotation,
    wrong_switches,
)
from loongforge.models.parts.decoder import FIELDS, REQUIRED, default_head
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.prediction import COUNT, Predicting, wrong_prediction_count
from loongforge.models.parts.rope import KEYS, Rope, rotary_share

ROTATED = 0.5
"""Share of a head that transformers rotates where a file does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Glm4MoeConfig(Predicting):
    """A GLM-4.5 model: grouped-query attention with half of each head rotated, sigmoid-routed experts behind a few
    dense layers.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "glm4_moe"
    KEYS: ClassVar[HFKeys] = HFKeys(
        model_type="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        fields={
            **FIELDS,
            "num_key_value_heads": "num_query_groups",
            "attention_bias": "add_qkv_bias",
            "use_qk_norm": "qk_layernorm",
            "first_k_dense_replace": "first_dense_layers",
            "n_routed_experts": "num_experts",
            "num_experts_per_tok": "moe_router_topk",
            "moe_intermediate_size": "moe_ffn_hidden_size",
            "routed_scaling_factor": "moe_router_topk_scaling_factor",
        },
        required=(
            *(*REQUIRED, "num_key_value_heads", "first_k_dense_replace", "n_routed_experts"),
            *("num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor"),
        ),
        only={
            "hidden_act": ("silu", "the MLP of GLM-4.5 is SwiGLU"),
            "n_group": (1, "no released GLM-4.5 has its experts in groups"),
            "norm_topk_prob": (True, "sigmoid routing makes the weights of the chosen experts sum to one"),
            "topk_group": (1, "no released GLM-4.5 has its experts in groups"),
        },
        ignored={"output_router_logits": "what transformers returns"},
        special=(*KEYS, "head_dim", "n_shared_experts", "num_nextn_predict_layers", "partial_rotary_factor"),
        aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    )
    ROPE: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("partial_rotary_factor",)}

    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int = 128
    """Width of one head, independent of the hidden size."""
    add_qkv_bias: bool = False
    """Biases in the query, key and value projections."""
    qk_layernorm: bool = False
    """RMSNorm over each head of query and key before the rotation."""
    rotary_percent: float = ROTATED
    """Share of a head that is rotated, its first channels."""
    first_dense_layers: int = 0
    """Layers at the beginning with a plain MLP of ffn_hidden_size."""
    num_experts: int
    """Experts of every other layer."""
    moe_router_topk: int
    """Experts that a token goes to."""
    moe_ffn_hidden_size: int
    """Width of one expert between its gate-and-up and down matrices."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of the expert that every token passes, a multiple of moe_ffn_hidden_size; null without."""
    moe_router_topk_scaling_factor: float = 1.0
    """Factor on the weights of the chosen experts."""
    moe_router_bias_update_rate: float = 0.001
    """What the bias of an expert's choice goes up or down by after every step; not part of `config.json`."""
    moe_aux_loss_coeff: float = 0.0
    """Factor of the load-balancing loss while training, besides the bias that balances; not part of `config.json`."""
    moe_router_load_balancing_type: LoadBalancing = "aux_loss"
    """Over which tokens that loss counts choices: a micro-batch, each sequence, or the step; `none` leaves it out."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        shared = (
            ("moe_shared_expert_intermediate_size",) if self.moe_shared_expert_intermediate_size is not None else ()
        )
        counts = ("num_query_groups", "kv_channels", "num_experts", "moe_router_topk", "moe_ffn_hidden_size")
        return [
            *wrong_counts(self.LABEL, self, *counts, *shared),
            *wrong_switches(self.LABEL, self, "add_qkv_bias", "qk_layernorm"),
            *wrong_numbers(self.LABEL, self, "moe_router_topk_scaling_factor"),
            *wrong_rates(self.LABEL, self, "first_dense_layers", "moe_router_bias_update_rate", "moe_aux_loss_coeff"),
            *wrong_balancing(self.LABEL, self),
            *self.prediction_problems(),
        ]

    def own_contradictions(self) -> list[str]:
        """Values that do not go together."""
        label, shared = self.LABEL, self.moe_shared_expert_intermediate_size or 0
        problems = wrong_groups(label, self) + wrong_experts(label, self) + wrong_rotation(label, self)
        if self.first_dense_layers > self.num_layers:
            problems.append(
                f"{label}: first_dense_layers={self.first_dense_layers!r} must not exceed num_layers="
                f"{self.num_layers!r}."
            )
        if shared % self.moe_ffn_hidden_size:
            problems.append(
                f"{label}: moe_shared_expert_intermediate_size={shared!r} must be a multiple of moe_ffn_hidden_size="
                f"{self.moe_ffn_hidden_size!r}."
            )
        return problems

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """Widths that follow from others, and the rotated share of a head."""
        share, problems = rotary_share(hf, rope, ROTATED)
        values: dict[str, Any] = {"rotary_percent": share, "kv_channels": default_head(hf)}
        if shared := hf.get("n_shared_experts", 1):  # transformers' default
            values["moe_shared_expert_intermediate_size"] = shared * (hf.get("moe_intermediate_size") or 0)
        return values, problems + wrong_prediction_count(hf)

    def own_keys(self) -> dict[str, Any]:
        """What every released file says besides."""
        return {
            "head_dim": self.kv_channels,
            "n_group": 1,
            "n_shared_experts": (self.moe_shared_expert_intermediate_size or 0) // self.moe_ffn_hidden_size,
            "norm_topk_prob": True,
            COUNT: self.mtp_num_layers,
            "partial_rotary_factor": self.rotary_percent,
            "rope_scaling": None,
            "topk_group": 1,
        }

    def own_geometry(self) -> dict[str, Any]:
        """Grouped-query attention and experts."""
        return {
            **self.prediction_geometry(),
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "add_qkv_bias": self.add_qkv_bias,
            "qk_layernorm": self.qk_layernorm,
            "rotary_percent": self.rotary_percent,
            "experts": ExpertGeometry(
                num_experts=self.num_experts,
                topk=self.moe_router_topk,
                ffn_hidden_size=self.moe_ffn_hidden_size,
                first_dense_layers=self.first_dense_layers,
                score_function="sigmoid",
                scaling=self.moe_router_topk_scaling_factor,
                expert_bias=True,
                bias_update_rate=self.moe_router_bias_update_rate,
                shared_ffn_hidden_size=self.moe_shared_expert_intermediate_size,
                aux_loss_coeff=self.moe_aux_loss_coeff,
                load_balancing=self.moe_router_load_balancing_type,
            ),
        }
