"""The geometry of a Qwen3 model with experts, and its two-way translation to a Hugging Face `config.json`."""

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
    wrong_rates,
    wrong_sections,
    wrong_switches,
)
from loongforge.models.parts.decoder import FIELDS, REQUIRED, Decoder
from loongforge.models.parts.decoder_weights import ExpertLayout
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.rope import KEYS, Rope, mrope_section, mrope_written


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3MoeConfig(Decoder):
    """A Qwen3 model whose every MLP is a mixture of experts; attention as in the dense Qwen3.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "qwen3_moe"
    KEYS: ClassVar[HFKeys] = HFKeys(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        fields={
            **FIELDS,
            "num_key_value_heads": "num_query_groups",
            "head_dim": "kv_channels",
            "num_experts": "num_experts",
            "num_experts_per_tok": "moe_router_topk",
            "moe_intermediate_size": "moe_ffn_hidden_size",
            "router_aux_loss_coef": "moe_aux_loss_coeff",
        },
        required=(
            *(*REQUIRED, "num_key_value_heads"),
            *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        ),
        only={
            "attention_bias": (False, "no released Qwen3 has biases"),
            "decoder_sparse_step": (1, "every layer of a released Qwen3 has experts"),
            "hidden_act": ("silu", "the MLP of Qwen3 is SwiGLU"),
            "qkv_bias": (False, "no released Qwen3 has biases"),
            "shared_expert_intermediate_size": (0, "no released Qwen3 has a shared expert"),
            "use_qk_norm": (True, "every Qwen3 normalises query and key"),
            "use_sliding_window": (False, "every layer of a released Qwen3 attends to everything before it"),
        },
        ignored={
            "max_window_layers": "sliding window is off",
            "output_router_logits": "what transformers returns",
            "sliding_window": "sliding window is off",
        },
        special=(*KEYS, "layer_types", "mlp_only_layers", "norm_topk_prob"),
        aliases={"num_local_experts": "num_experts"},  # transformers 5
    )
    ROPE: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("mrope_section", "mrope_interleaved")}

    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int = 128
    """Width of one head, independent of the hidden size."""
    num_experts: int
    """Experts of every layer."""
    moe_router_topk: int
    """Experts that a token goes to."""
    moe_ffn_hidden_size: int
    """Width of one expert between its gate-and-up and down matrices."""
    moe_router_pre_softmax: bool = False
    """The chosen experts' weights are their share among all experts; unset, they sum to one (`norm_topk_prob`)."""
    moe_aux_loss_coeff: float = 0.001
    """Factor of the load-balancing loss while training."""
    moe_router_load_balancing_type: LoadBalancing = "aux_loss"
    """Over which tokens that loss counts choices: a micro-batch, each sequence, or the step; `none` leaves it out."""
    mrope_section: tuple[int, int, int] | None = None
    """Rotated pairs of a head for time, height and width, in a model that sees; ordinary positions when unset."""
    mrope_interleaved: bool = False
    """Frequencies of the sections take turns, as in Qwen3-VL, instead of standing in three blocks."""
    expert_layout: ExpertLayout = "per_expert"
    """How Hugging Face checkpoints hold the experts: each one's own tensors, or all of a layer stacked (Qwen3-VL)."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        counts = ("num_query_groups", "kv_channels", "num_experts", "moe_router_topk", "moe_ffn_hidden_size")
        return [
            *wrong_counts(self.LABEL, self, *counts),
            *wrong_switches(self.LABEL, self, "moe_router_pre_softmax", "mrope_interleaved"),
            *wrong_rates(self.LABEL, self, "moe_aux_loss_coeff"),
            *wrong_balancing(self.LABEL, self),
        ]

    def own_contradictions(self) -> list[str]:
        """Values that do not go together."""
        label = self.LABEL
        return wrong_groups(label, self) + wrong_sections(label, self) + wrong_experts(label, self)

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """How the router weighs, and the sections of the positions."""
        values = {
            "mrope_section": mrope_section(rope.parameters),
            "mrope_interleaved": bool(rope.parameters.get("mrope_interleaved", False)),
            "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),  # transformers' default
        }
        if hf.get("mlp_only_layers"):
            problem = f"config.json: mlp_only_layers={hf['mlp_only_layers']!r} is not supported, only []."
            return values, [f"{problem} Every layer of a released Qwen3 has experts."]
        return values, []

    def own_keys(self) -> dict[str, Any]:
        """What every released file says besides."""
        return {
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "max_window_layers": self.num_layers,
            "mlp_only_layers": [],
            "norm_topk_prob": not self.moe_router_pre_softmax,
            "output_router_logits": False,
            "rope_scaling": mrope_written(self.mrope_section, interleaved=self.mrope_interleaved),
            "sliding_window": None,
            "use_sliding_window": False,
        }

    def own_geometry(self) -> dict[str, Any]:
        """Grouped-query attention with head norms, and experts."""
        return {
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "qk_layernorm": True,
            "mrope_section": self.mrope_section,
            "mrope_interleaved": self.mrope_interleaved,
            "experts": ExpertGeometry(
                num_experts=self.num_experts,
                topk=self.moe_router_topk,
                ffn_hidden_size=self.moe_ffn_hidden_size,
                normalise_topk=not self.moe_router_pre_softmax,
                aux_loss_coeff=self.moe_aux_loss_coeff,
                load_balancing=self.moe_router_load_balancing_type,
            ),
        }
