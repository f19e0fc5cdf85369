"""The geometry of an InternLM2.5 model, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loongforge.models.parts.checks import wrong_counts, wrong_groups, wrong_head, wrong_numbers
from loongforge.models.parts.decoder import FIELDS, REQUIRED, Decoder
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.rope import KEYS, Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class InternLM2Config(Decoder):
    """An InternLM2 or InternLM2.5 model: grouped-query attention, SwiGLU, no biases.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "internlm2"
    KEYS: ClassVar[HFKeys] = HFKeys(
        model_type="internlm2",
        architecture="InternLM2ForCausalLM",
        fields={**FIELDS, "num_key_value_heads": "num_query_groups"},
        required=(*REQUIRED, "num_key_value_heads"),
        only={
            "bias": (False, "no released InternLM2.5 has biases"),
            "hidden_act": ("silu", "the MLP of InternLM2.5 is SwiGLU"),
        },
        ignored={
            "attn_implementation": "how the released code computes attention",
            "auto_map": "code that comes with the weights; the architecture is known here",
            "pretraining_tp": "how the released code splits its matrices; same result",
        },
        special=KEYS,
    )
    ROPE: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": (), "dynamic": ("factor",)}

    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    dynamic_rope_factor: float | None = None
    """Sequences longer than max_position_embeddings raise the rotary base by it, which is not computed here: they are
    refused when it is set. Up to that length positions are the plain ones."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        factors = () if self.dynamic_rope_factor is None else ("dynamic_rope_factor",)
        counts = wrong_counts(self.LABEL, self, "num_query_groups")
        return counts + wrong_numbers(self.LABEL, self, *factors)

    def own_contradictions(self) -> list[str]:
        """Values that do not go together."""
        return wrong_head(self.LABEL, self) or wrong_groups(self.LABEL, self)

    @property
    def kv_channels(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """The stretch of long sequences."""
        if rope.kind != "dynamic":
            return {}, []
        factor = rope.parameters.get("factor")
        problems = ["config.json: the dynamic scaling of the positions lacks 'factor'."] if factor is None else []
        return {"dynamic_rope_factor": factor}, problems

    def own_keys(self) -> dict[str, Any]:
        """What every released file says besides."""
        factor = self.dynamic_rope_factor
        return {
            "auto_map": {
                "AutoConfig": "configuration_internlm2.InternLM2Config",
                "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
                "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
            },
            "bias": False,
            "rope_scaling": None if factor is None else {"factor": factor, "type": "dynamic"},
        }

    def own_geometry(self) -> dict[str, Any]:
        """Grouped-query attention, and up to which length its positions hold."""
        return {
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "rotary_limit": None if self.dynamic_rope_factor is None else self.max_position_embeddings,
        }
