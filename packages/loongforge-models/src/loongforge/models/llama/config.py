"""The geometry of a LLaMA model, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loongforge.models.parts.checks import wrong_counts, wrong_groups
from loongforge.models.parts.decoder import FIELDS, REQUIRED, default_head
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.llama3_rope import Llama3Rope
from loongforge.models.parts.rope import KEYS, Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(Llama3Rope):
    """A LLaMA 2, 3, 3.1 or 3.2 text model: grouped-query attention, SwiGLU, no biases.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "llama"
    KEYS: ClassVar[HFKeys] = HFKeys(
        model_type="llama",
        architecture="LlamaForCausalLM",
        fields={**FIELDS, "num_key_value_heads": "num_query_groups"},
        required=(*REQUIRED, "num_key_value_heads"),
        only={
            "attention_bias": (False, "no released LLaMA has biases"),
            "hidden_act": ("silu", "the MLP of LLaMA is SwiGLU"),
            "mlp_bias": (False, "no released LLaMA has biases"),
        },
        ignored={"pretraining_tp": "how transformers splits its matrices; same result"},
        special=(*KEYS, "head_dim"),
    )

    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int
    """Width of one head."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        return wrong_counts(self.LABEL, self, "num_query_groups", "kv_channels") + Llama3Rope.own_problems(self)

    def own_contradictions(self) -> list[str]:
        """Values that do not go together."""
        return wrong_groups(self.LABEL, self) + Llama3Rope.own_contradictions(self)

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """Width of a head, and the stretch of the positions."""
        stretch, problems = Llama3Rope.own_values(hf, rope)
        return {"kv_channels": default_head(hf), **stretch}, problems

    def own_keys(self) -> dict[str, Any]:
        """What every released file says besides; `head_dim` only where it is not what its absence means."""
        usual = self.kv_channels * self.num_attention_heads == self.hidden_size
        head = {} if usual else {"head_dim": self.kv_channels}
        more = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
        return {**head, **more, **Llama3Rope.own_keys(self)}

    def own_geometry(self) -> dict[str, Any]:
        """Grouped-query attention, and the stretch of the positions."""
        attention = {"num_query_groups": self.num_query_groups, "kv_channels": self.kv_channels}
        return {**attention, **Llama3Rope.own_geometry(self)}
