"""The geometry of a DeepSeek-V3 model, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loongforge.core.model.geometry import ExpertGeometry, LatentGeometry, LoadBalancing
from loongforge.models.deepseek3.keys import (
    BALANCING,
    HF_KEYS,
    YARN,
    YARN_DEFAULTS,
    fixed_keys,
    wrong_attention_keys,
    wrong_yarn,
)
from loongforge.models.parts.checks import wrong_balancing, wrong_counts, wrong_experts, wrong_numbers, wrong_rates
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.prediction import COUNT, Predicting, wrong_prediction_count
from loongforge.models.parts.rope import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSeek3Config(Predicting):
    """A DeepSeek-V3 model: multi-head latent attention, sigmoid-routed experts behind a few dense layers.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "deepseek3"
    KEYS: ClassVar[HFKeys] = HF_KEYS
    ROPE: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": (), "yarn": tuple(YARN)}

    q_lora_rank: int | None
    """Rank of the queries; null projects them directly."""
    kv_lora_rank: int
    """Rank of the latent that keys and values come from."""
    qk_head_dim: int
    """Width of a head's part without rotation."""
    qk_pos_emb_head_dim: int
    """Width of the rotated part, one for all heads on the key side."""
    v_head_dim: int
    """Width of a head's values."""
    rotary_scaling_factor: float = 1.0
    """YaRN extension over original_max_position_embeddings; 1 is the plain rotation."""
    original_max_position_embeddings: int = 4096
    """Length that the model was trained at before the extension."""
    beta_fast: float = 32.0
    """YaRN: turns over the original length above which a frequency stays."""
    beta_slow: float = 1.0
    """YaRN: turns over the original length below which a frequency is stretched whole."""
    mscale: float = 1.0
    """YaRN: weight of the extension in the rotated part's amplitude."""
    mscale_all_dim: float = 1.0
    """YaRN: weight of the extension in the attention scale."""
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
    moe_router_num_groups: int | None = None
    """Groups that the experts are divided into; all are looked at when unset."""
    moe_router_group_topk: int | None = None
    """Groups that a token's experts may come from."""
    moe_router_topk_scaling_factor: float = 1.0
    """Factor on the weights of the chosen experts."""
    moe_router_bias_update_rate: float = 0.001
    """What the bias of an expert's choice goes up or down by after every step; not part of `config.json`."""
    moe_aux_loss_coeff: float = 0.0
    """Factor of the load-balancing loss while training, besides the bias that balances (`aux_loss_alpha`)."""
    moe_router_load_balancing_type: LoadBalancing = "aux_loss"
    """Over which tokens that loss counts choices: a micro-batch, each sequence, or the step; `none` leaves it out."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        groups = ("moe_router_num_groups", "moe_router_group_topk")
        optional = ("q_lora_rank", "moe_shared_expert_intermediate_size", *groups)
        given = [name for name in optional if getattr(self, name) is not None]
        counts = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "num_experts", "moe_router_topk")
        more = ("moe_ffn_hidden_size", "original_max_position_embeddings")
        numbers = ("rotary_scaling_factor", "beta_fast", "beta_slow", "moe_router_topk_scaling_factor")
        rates = ("mscale", "mscale_all_dim", "first_dense_layers")
        training = ("moe_aux_loss_coeff", "moe_router_bias_update_rate")
        return [
            *wrong_counts(self.LABEL, self, *counts, *more, *given),
            *wrong_numbers(self.LABEL, self, *numbers),
            *wrong_rates(self.LABEL, self, *rates, *training),
            *wrong_balancing(self.LABEL, self),
            *self.prediction_problems(),
        ]

    def own_contradictions(self) -> list[str]:
        """Values that do not go together."""
        problems = wrong_experts(self.LABEL, self) + self._wrong_groups()
        if self.qk_pos_emb_head_dim % 2:
            problems.append(
                f"{self.LABEL}: qk_pos_emb_head_dim={self.qk_pos_emb_head_dim!r} must be even, rotation pairs its "
                "channels."
            )
        if self.first_dense_layers > self.num_layers:
            problems.append(
                f"{self.LABEL}: first_dense_layers={self.first_dense_layers!r} must not exceed "
                f"num_layers={self.num_layers!r}."
            )
        if (self.moe_shared_expert_intermediate_size or 0) % self.moe_ffn_hidden_size:
            problems.append(
                f"{self.LABEL}: moe_shared_expert_intermediate_size={self.moe_shared_expert_intermediate_size!r} must "
                f"be a multiple of moe_ffn_hidden_size={self.moe_ffn_hidden_size!r}."
            )
        return problems

    def _wrong_groups(self) -> list[str]:
        groups, chosen = self.moe_router_num_groups, self.moe_router_group_topk
        if groups is None and chosen is None:
            return []
        if groups is None or chosen is None:
            return [
                f"{self.LABEL}: moe_router_num_groups={groups!r} and moe_router_group_topk={chosen!r} belong together: "
                "give both or neither."
            ]
        if self.num_experts % groups or chosen > groups or self.moe_router_topk > chosen * (self.num_experts // groups):
            return [
                f"{self.LABEL}: moe_router_num_groups={groups!r} must divide num_experts={self.num_experts!r}, and "
                f"moe_router_group_topk={chosen!r} must be at most that, with at least "
                f"moe_router_topk={self.moe_router_topk!r} experts in as many groups."
            ]
        return []

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """The extension of the positions, the groups, and what only has to be right."""
        values: dict[str, Any] = {"q_lora_rank": hf.get("q_lora_rank")}
        problems = wrong_attention_keys(hf) + wrong_prediction_count(hf)
        if shared := hf.get("n_shared_experts", 1):  # transformers' default
            values["moe_shared_expert_intermediate_size"] = shared * (hf.get("moe_intermediate_size") or 0)
        if hf.get("n_group", 1) != 1:
            values |= {"moe_router_num_groups": hf["n_group"], "moe_router_group_topk": hf.get("topk_group")}
        if hf.get("aux_loss_alpha") or "seq_aux" in hf:
            sequence = hf.get("seq_aux", True)  # the default of the code that comes with the release
            if not isinstance(sequence, bool):
                problems.append(f"config.json: seq_aux={sequence!r} must be true or false.")
            kind = BALANCING[bool(sequence)]
            values |= {"moe_aux_loss_coeff": hf.get("aux_loss_alpha", 0.0), "moe_router_load_balancing_type": kind}
        if rope.kind == "yarn":
            given = {**YARN_DEFAULTS, **rope.parameters}
            lacking = [key for key in YARN if given.get(key) is None]
            problems += wrong_yarn(rope.parameters)
            problems += [f"config.json: the yarn scaling of the positions lacks {key!r}." for key in lacking]
            values |= {name: given[key] for key, name in YARN.items() if key not in lacking}
        return values, problems

    def own_keys(self) -> dict[str, Any]:
        """What every released file says besides."""
        scaling = None
        if self.rotary_scaling_factor != 1.0:
            scaling = {**{key: getattr(self, name) for key, name in YARN.items()}, "type": "yarn"}
        return {
            **fixed_keys(),
            COUNT: self.mtp_num_layers,
            **self._balance_keys(),
            "n_group": self.moe_router_num_groups or 1,
            "n_shared_experts": (self.moe_shared_expert_intermediate_size or 0) // self.moe_ffn_hidden_size,
            "num_key_value_heads": self.num_attention_heads,
            "q_lora_rank": self.q_lora_rank,
            "rope_scaling": scaling,
            "topk_group": self.moe_router_group_topk or 1,
        }

    def _balance_keys(self) -> dict[str, Any]:
        """How the model is balanced, where there are words for it."""
        said = {kind: sequence for sequence, kind in BALANCING.items()}
        unsaid = not self.moe_aux_loss_coeff and self.moe_router_load_balancing_type == "aux_loss"
        if self.moe_router_load_balancing_type in said and not unsaid:
            return {
                "aux_loss_alpha": self.moe_aux_loss_coeff,
                "seq_aux": said[self.moe_router_load_balancing_type],
            }
        return {}

    def own_geometry(self) -> dict[str, Any]:
        """Latent attention, and experts chosen by a sigmoid with a bias."""
        return self.latent_geometry() | {
            "experts": self.expert_geometry(
                score_function="sigmoid",
                scaling=self.moe_router_topk_scaling_factor,
                expert_bias=True,
                bias_update_rate=self.moe_router_bias_update_rate,
            )
        }

    def latent_geometry(self) -> dict[str, Any]:
        """Latent attention, as every model of this kind has it."""
        return {
            **self.prediction_geometry(),
            "num_query_groups": self.num_attention_heads,
            "kv_channels": self.qk_head_dim + self.qk_pos_emb_head_dim,
            "latent": LatentGeometry(
                q_lora_rank=self.q_lora_rank,
                kv_lora_rank=self.kv_lora_rank,
                qk_nope_head_dim=self.qk_head_dim,
                qk_rope_head_dim=self.qk_pos_emb_head_dim,
                v_head_dim=self.v_head_dim,
                norm_epsilon=1e-6,  # whatever norm_epsilon says: as the reference code builds the two norms
                rope_factor=self.rotary_scaling_factor,
                original_max_position_embeddings=self.original_max_position_embeddings,
                beta_fast=self.beta_fast,
                beta_slow=self.beta_slow,
                mscale=self.mscale,
                mscale_all_dim=self.mscale_all_dim,
            ),
        }

    def expert_geometry(self, **routing: Any) -> ExpertGeometry:
        """Experts behind the dense layers; `routing` says how they are chosen."""
        return ExpertGeometry(
            num_experts=self.num_experts,
            topk=self.moe_router_topk,
            ffn_hidden_size=self.moe_ffn_hidden_size,
            first_dense_layers=self.first_dense_layers,
            num_groups=self.moe_router_num_groups,
            topk_groups=self.moe_router_group_topk,
            shared_ffn_hidden_size=self.moe_shared_expert_intermediate_size,
            aux_loss_coeff=self.moe_aux_loss_coeff,
            load_balancing=self.moe_router_load_balancing_type,
            **routing,
        )
