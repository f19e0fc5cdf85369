"""The geometry of a MiMo model, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loongforge.models.parts.checks import wrong_counts, wrong_groups
from loongforge.models.parts.decoder import FIELDS, REQUIRED, default_head
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.prediction import COUNT, Predicting, wrong_prediction_count
from loongforge.models.parts.rope import KEYS, Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class MiMoConfig(Predicting):
    """A MiMo-7B model: grouped-query attention with biases on query, key and value as in Qwen2, and further layers for
    multi-token prediction.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "mimo"
    KEYS: ClassVar[HFKeys] = HFKeys(
        model_type="mimo",
        architecture="MiMoForCausalLM",
        fields={**FIELDS, "num_key_value_heads": "num_query_groups"},
        required=(*REQUIRED, "num_key_value_heads"),
        only={
            "attention_bias": (True, "every released MiMo has biases on query, key and value"),
            "hidden_act": ("silu", "the MLP of MiMo is SwiGLU"),
            "use_mrope": (False, "a model with three rows of positions is a MiMo-VL"),
            "use_sliding_window": (False, "every layer of a released MiMo attends to everything before it"),
        },
        ignored={
            "auto_map": "code that comes with the weights; the architecture is known here",
            "max_window_layers": "sliding window is off",
            "sliding_window": "sliding window is off",
        },
        special=(*KEYS, COUNT, "head_dim", "layer_types"),
    )

    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int
    """Width of one head; hidden_size / num_attention_heads in every release."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        return wrong_counts(self.LABEL, self, "num_query_groups", "kv_channels") + self.prediction_problems()

    def own_contradictions(self) -> list[str]:
        """Values that do not go together."""
        return wrong_groups(self.LABEL, self)

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """Width of a head."""
        return {"kv_channels": default_head(hf)}, wrong_prediction_count(hf)

    def own_keys(self) -> dict[str, Any]:
        """What every released file says besides."""
        return {
            "attention_bias": True,
            "head_dim": self.kv_channels,
            COUNT: self.mtp_num_layers,
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
        }

    def own_geometry(self) -> dict[str, Any]:
        """Grouped-query attention with biases."""
        return {
            **self.prediction_geometry(),
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "add_qkv_bias": True,
        }
