"""The geometry of a DeepSeek-V2 model, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from loongforge.models.deepseek3.config import DeepSeek3Config
from loongforge.models.deepseek3.keys import HF_KEYS
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.rope import Rope

METHODS = {False: "greedy", True: "group_limited_greedy"}
"""`topk_method` of a file, by whether experts are in groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSeek2Config(DeepSeek3Config):
    """A DeepSeek-V2 model: the fields of DeepSeek-V3, with experts chosen by a softmax whose shares are not made to sum
    to one, and groups judged by their best expert.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "deepseek2"
    KEYS: ClassVar[HFKeys] = replace(
        HF_KEYS,
        model_type="deepseek_v2",
        also=(),
        architecture="DeepseekV2ForCausalLM",
        only={
            **{key: value for key, value in HF_KEYS.only.items() if key not in ("scoring_func", "topk_method")},
            "attention_bias": (False, "no released DeepSeek-V2 has biases"),
            "hidden_act": ("silu", "the MLP of DeepSeek-V2 is SwiGLU"),
            "mlp_bias": (False, "no released DeepSeek-V2 has biases"),
            "norm_topk_prob": (False, "the weights of the chosen experts are their share among all"),
            "scoring_func": ("softmax", "DeepSeek-V2 routes by softmax"),
        },
        special=(*HF_KEYS.special, "topk_method"),
    )

    def own_contradictions(self) -> list[str]:
        """As in DeepSeek-V3, which alone has further layers."""
        problems = DeepSeek3Config.own_contradictions(self)
        if self.mtp_num_layers:
            problems.append(
                f"{self.LABEL}: mtp_num_layers={self.mtp_num_layers!r} must be 0: DeepSeek-V2 predicts one token."
            )
        return problems

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """As in DeepSeek-V3; the way of choosing goes with the groups."""
        grouped = (hf.get("n_group") or 1) != 1
        values, problems = DeepSeek3Config.own_values({**hf, "n_group": hf.get("n_group") or 1}, rope)
        method = hf.get("topk_method", METHODS[grouped])
        if method != METHODS[grouped]:
            problems.append(
                f"config.json: topk_method={method!r} with n_group={hf.get('n_group')!r} is not supported, only "
                f"{METHODS[grouped]!r}: one group is no choice of groups."
            )
        return values, problems

    def own_keys(self) -> dict[str, Any]:
        """What every released file says besides."""
        keys = DeepSeek3Config.own_keys(self)
        del keys["num_nextn_predict_layers"]
        grouped = self.moe_router_num_groups is not None
        return {**keys, "norm_topk_prob": False, "scoring_func": "softmax", "topk_method": METHODS[grouped]}

    def own_geometry(self) -> dict[str, Any]:
        """Latent attention, and experts chosen by a softmax."""
        return self.latent_geometry() | {
            "experts": self.expert_geometry(
                score_function="softmax",
                normalise_topk=False,
                scaling=self.moe_router_topk_scaling_factor,
                group_score="best",
            )
        }
