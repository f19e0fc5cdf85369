"""The geometry of a MiniMax-M2 model, and its two-way translation to a Hugging Face `config.json`."""

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
    wrong_rotation,
)
from loongforge.models.parts.decoder import FIELDS, REQUIRED, Decoder, default_head
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.rope import KEYS, Rope, rotary_share

ROTARY_BASE = 5e6
"""Base of the rotation where a file is silent; transformers' default."""
TOKENS = {"bos_token_id": 200034, "eos_token_id": 200020}
"""What begins and ends a text where a file is silent, as those of M2.1 on are; transformers' defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniMaxM2Config(Decoder):
    """A MiniMax-M2 model: grouped-query attention with norms over all heads and part of each head rotated, and
    sigmoid-routed experts in every layer.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "minimax_m2"
    KEYS: ClassVar[HFKeys] = HFKeys(
        model_type="minimax_m2",
        architecture="MiniMaxM2ForCausalLM",
        fields={
            **FIELDS,
            "num_key_value_heads": "num_query_groups",
            "num_local_experts": "num_experts",
            "num_experts_per_tok": "moe_router_topk",
            "router_aux_loss_coef": "moe_aux_loss_coeff",
        },
        required=(*REQUIRED, "num_key_value_heads", "num_local_experts", "num_experts_per_tok"),
        only={
            **dict.fromkeys(
                (f"layernorm_{kind}_beta" for kind in ("full_attention", "linear_attention", "mlp")),
                (1.0, "the residual stream is added as it is"),
            ),
            "attention_bias": (False, "no released MiniMax-M2 has biases"),
            "hidden_act": ("silu", "the experts of MiniMax-M2 are SwiGLU"),
            "qk_norm_type": ("per_layer", "query and key are normalised over all heads"),
            "router_jitter_noise": (0.0, "routers see what the layer sees"),
            "scoring_func": ("sigmoid", "MiniMax-M2 routes by sigmoid"),
            "shared_intermediate_size": (0, "no released MiniMax-M2 has a shared expert"),
            "use_qk_norm": (True, "every MiniMax-M2 normalises query and key"),
            "use_routing_bias": (True, "every MiniMax-M2 chooses experts with a bias"),
        },
        ignored={
            "attn_window_size": "of layers with windows, which none is",
            "auto_map": "code that comes with the weights; the architecture is known here",
            "max_model_len": "the engine's",
            "mlp_intermediate_size": "of layers without experts, which none is",
            "mtp_transformer_layers": "multi-token prediction, which is left out",
            "num_mtp_modules": "multi-token prediction, which is left out",
            "output_router_logits": "what transformers returns",
            "shared_moe_mode": "of a shared expert, and there is none",
            "sliding_window": "every layer attends to everything before it",
            "use_mtp": "multi-token prediction, which is left out",
        },
        special=(*KEYS, "attn_type_list", "head_dim", "layer_types", "partial_rotary_factor", "rotary_dim"),
        aliases={"num_experts": "num_local_experts"},
    )
    ROPE: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("partial_rotary_factor",)}

    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int = 128
    """Width of one head, independent of the hidden size."""
    rotary_percent: float = 0.5
    """Share of a head that is rotated, its first channels."""
    num_experts: int
    """Experts of every layer."""
    moe_router_topk: int
    """Experts that a token goes to."""
    ffn_hidden_size: int
    """Width of one expert between its gate-and-up and down matrices; no layer has another MLP."""
    moe_router_bias_update_rate: float = 0.001
    """What the bias of an expert's choice goes up or down by after every step; not part of `config.json`."""
    moe_aux_loss_coeff: float = 0.001
    """Factor of the load-balancing loss while training, besides the bias that balances."""
    moe_router_load_balancing_type: LoadBalancing = "aux_loss"
    """Over which tokens that loss counts choices: a micro-batch, each sequence, or the step; `none` leaves it out."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        counts = ("num_query_groups", "kv_channels", "num_experts", "moe_router_topk")
        return [
            *wrong_counts(self.LABEL, self, *counts),
            *wrong_rates(self.LABEL, self, "moe_router_bias_update_rate", "moe_aux_loss_coeff"),
            *wrong_balancing(self.LABEL, self),
        ]

    def own_contradictions(self) -> list[str]:
        """Values that do not go together."""
        label = self.LABEL
        return wrong_groups(label, self) + wrong_experts(label, self) + wrong_rotation(label, self)

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """Width and rotated share of a head, the base of the rotation, and that every layer has attention."""
        head, rotated = default_head(hf), hf.get("rotary_dim")
        share, problems = rotary_share(hf, rope, 1.0 if rotated is None else rotated / (head or 1))
        if rotated is not None and rotated != head * share:
            problems.append(
                f"config.json: rotary_dim={rotated!r} contradicts the share {share!r} of head_dim={head!r}; remove the "
                "one that is wrong."
            )
        if set(hf.get("attn_type_list") or [1]) != {1}:
            problems.append(
                f"config.json: attn_type_list={hf['attn_type_list']!r} is not supported, only 1 for every layer: "
                "softmax attention."
            )
        values: dict[str, Any] = {"rotary_percent": share, "kv_channels": head}
        values |= {key: token for key, token in TOKENS.items() if key not in hf}
        return values | ({"rotary_base": ROTARY_BASE} if rope.base is None else {}), problems

    def own_keys(self) -> dict[str, Any]:
        """What every released file says besides, and which tokens there are none of.

        Multi-token prediction has no weights in an export.
        """
        return {
            **{key: None for key in TOKENS if getattr(self, key) is None},
            "attn_type_list": [1] * self.num_layers,
            "head_dim": self.kv_channels,
            "qk_norm_type": "per_layer",
            "rotary_dim": round(self.kv_channels * self.rotary_percent),
            "scoring_func": "sigmoid",
            "shared_intermediate_size": 0,
            "use_mtp": False,
            "use_qk_norm": True,
            "use_routing_bias": True,
        }

    def own_geometry(self) -> dict[str, Any]:
        """Grouped-query attention with norms over all heads, and experts."""
        return {
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "qk_layernorm": True,
            "qk_norm_whole": True,
            "rotary_percent": self.rotary_percent,
            "experts": ExpertGeometry(
                num_experts=self.num_experts,
                topk=self.moe_router_topk,
                ffn_hidden_size=self.ffn_hidden_size,
                score_function="sigmoid",
                expert_bias=True,
                bias_update_rate=self.moe_router_bias_update_rate,
                aux_loss_coeff=self.moe_aux_loss_coeff,
                load_balancing=self.moe_router_load_balancing_type,
            ),
        }
