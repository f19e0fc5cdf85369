"""The geometry of a Qwen3-Next model, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loongforge.core.model.geometry import DeltaGeometry, ExpertGeometry, LoadBalancing
from loongforge.models.parts.checks import (
    wrong_balancing,
    wrong_counts,
    wrong_experts,
    wrong_groups,
    wrong_rates,
    wrong_rotation,
    wrong_switches,
)
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.prediction import Predicting
from loongforge.models.parts.rope import Rope, rotary_share
from loongforge.models.qwen3_next.keys import HF_KEYS, ROTATED, attention_interval, wrong_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3NextConfig(Predicting):
    """A Qwen3-Next model: in every layer but each `linear_attention_freq`-th a gated delta rule in place of attention.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "qwen3_next"
    KEYS: ClassVar[HFKeys] = HF_KEYS
    ROPE: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("partial_rotary_factor",)}

    num_query_groups: int
    """Key/value heads of attention; each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int = 256
    """Width of one head of attention, independent of the hidden size."""
    rotary_percent: float = 0.25
    """Share of a head that is rotated, its first channels."""
    linear_attention_freq: int = 4
    """Every layer of this number has attention; those between have a gated delta rule."""
    linear_num_key_heads: int
    """Query and key heads of the gated delta rule; each serves its share of the value heads."""
    linear_num_value_heads: int
    """Value heads of the gated delta rule."""
    linear_key_head_dim: int
    """Width of a query or key head of the gated delta rule."""
    linear_value_head_dim: int
    """Width of a value head of the gated delta rule."""
    linear_conv_kernel_dim: int = 4
    """Tokens that the convolution in front of the gated delta rule looks at."""
    num_experts: int
    """Experts of every layer."""
    moe_router_topk: int
    """Experts that a token goes to."""
    moe_ffn_hidden_size: int
    """Width of one expert between its gate-and-up and down matrices."""
    moe_shared_expert_intermediate_size: int
    """Width of the expert that every token passes, weighed by a sigmoid."""
    moe_router_pre_softmax: bool = False
    """The chosen experts' weights are their share among all experts; unset, they sum to one (`norm_topk_prob`)."""
    moe_aux_loss_coeff: float = 0.001
    """Factor of the load-balancing loss while training."""
    moe_router_load_balancing_type: LoadBalancing = "aux_loss"
    """Over which tokens that loss counts choices: a micro-batch, each sequence, or the step; `none` leaves it out."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        counts = (
            *("num_query_groups", "kv_channels", "linear_attention_freq", "linear_num_key_heads"),
            *("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"),
            *("num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
        )
        return [
            *wrong_counts(self.LABEL, self, *counts),
            *wrong_switches(self.LABEL, self, "moe_router_pre_softmax"),
            *wrong_rates(self.LABEL, self, "moe_aux_loss_coeff"),
            *wrong_balancing(self.LABEL, self),
            *self.prediction_problems(),
        ]

    def own_contradictions(self) -> list[str]:
        """Values that do not go together."""
        label = self.LABEL
        problems = wrong_groups(label, self) + wrong_experts(label, self) + wrong_rotation(label, self)
        if self.linear_num_value_heads % self.linear_num_key_heads:
            problems.append(
                f"{label}: linear_num_value_heads={self.linear_num_value_heads!r} must be a multiple of "
                f"linear_num_key_heads={self.linear_num_key_heads!r}."
            )
        if not 2 <= self.linear_attention_freq <= self.num_layers:
            problems.append(
                f"{label}: linear_attention_freq={self.linear_attention_freq!r} must be between 2 and "
                f"num_layers={self.num_layers!r}: both kinds of layers are there."
            )
        if self.mtp_num_layers > 1:
            problems.append(
                f"{label}: mtp_num_layers={self.mtp_num_layers!r} must be 0 or 1: a checkpoint has names for one."
            )
        return problems

    @classmethod
    def own_layer_types(cls, hf: Mapping[str, Any]) -> list[str]:
        """Which layers have attention, said once or twice, and which have experts."""
        return wrong_layers(hf)

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """The interval of attention, the rotated share of a head, and how the router weighs."""
        share, problems = rotary_share(hf, rope, ROTATED)
        values = {
            "linear_attention_freq": attention_interval(hf),
            "rotary_percent": share,
            "moe_router_pre_softmax": not hf.get("norm_topk_prob", True),  # transformers' default
        }
        return values, problems

    def own_keys(self) -> dict[str, Any]:
        """What every released file says besides."""
        return {
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "full_attention_interval": self.linear_attention_freq,
            "mlp_only_layers": [],
            "norm_topk_prob": not self.moe_router_pre_softmax,
            "output_router_logits": False,
            "partial_rotary_factor": self.rotary_percent,
            "rope_scaling": None,
            "use_sliding_window": False,
        }

    def own_geometry(self) -> dict[str, Any]:
        """Gated attention, gated delta rules between, norms about one, and experts with a gated shared one."""
        every = self.linear_attention_freq
        return {
            **self.prediction_geometry(),
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "qk_layernorm": True,
            "attention_gate": True,
            "zero_centered_norm": True,
            "rotary_percent": self.rotary_percent,
            "delta": DeltaGeometry(
                layers=tuple(layer for layer in range(self.num_layers) if (layer + 1) % every),
                num_key_heads=self.linear_num_key_heads,
                num_value_heads=self.linear_num_value_heads,
                key_head_dim=self.linear_key_head_dim,
                value_head_dim=self.linear_value_head_dim,
                conv_kernel=self.linear_conv_kernel_dim,
            ),
            "experts": ExpertGeometry(
                num_experts=self.num_experts,
                topk=self.moe_router_topk,
                ffn_hidden_size=self.moe_ffn_hidden_size,
                normalise_topk=not self.moe_router_pre_softmax,
                shared_ffn_hidden_size=self.moe_shared_expert_intermediate_size,
                shared_gate=True,
                aux_loss_coeff=self.moe_aux_loss_coeff,
                load_balancing=self.moe_router_load_balancing_type,
            ),
        }
