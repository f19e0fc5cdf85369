"""The geometry of a Qwen2.5 model, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loongforge.models.parts.checks import wrong_counts, wrong_groups, wrong_sections
from loongforge.models.parts.decoder import FIELDS, REQUIRED, Decoder, default_head
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.rope import KEYS, Rope, mrope_section, mrope_written


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2Config(Decoder):
    """A Qwen2.5 model (and Qwen2, Qwen1.5): grouped-query attention with biases on query, key and value, SwiGLU.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "qwen2"
    KEYS: ClassVar[HFKeys] = HFKeys(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        fields={**FIELDS, "num_key_value_heads": "num_query_groups"},
        required=(*REQUIRED, "num_key_value_heads"),
        only={
            "hidden_act": ("silu", "the MLP of Qwen2.5 is SwiGLU"),
            "use_mrope": (False, "a model with three rows of positions is a Qwen2.5-VL"),
            "use_sliding_window": (False, "every layer of a released Qwen2.5 attends to everything before it"),
        },
        ignored={
            "max_window_layers": "sliding window is off",
            "sliding_window": "sliding window is off",
        },
        special=(*KEYS, "layer_types", "head_dim"),
    )
    ROPE: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("mrope_section",)}

    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int
    """Width of one head; hidden_size / num_attention_heads in every release."""
    mrope_section: tuple[int, int, int] | None = None
    """Rotated pairs of a head for time, height and width, in a model that sees; ordinary positions when unset."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        return wrong_counts(self.LABEL, self, "num_query_groups", "kv_channels")

    def own_contradictions(self) -> list[str]:
        """Values that do not go together."""
        return wrong_groups(self.LABEL, self) + wrong_sections(self.LABEL, self)

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """Width of a head, and the sections of the positions."""
        return {"kv_channels": default_head(hf), "mrope_section": mrope_section(rope.parameters)}, []

    def own_keys(self) -> dict[str, Any]:
        """What every released file says besides; `head_dim` only where it is not what its absence means."""
        usual = self.kv_channels * self.num_attention_heads == self.hidden_size
        return {
            **({} if usual else {"head_dim": self.kv_channels}),
            "max_window_layers": self.num_layers,
            "rope_scaling": mrope_written(self.mrope_section),
            "sliding_window": None,
            "use_sliding_window": False,
        }

    def own_geometry(self) -> dict[str, Any]:
        """Grouped-query attention with biases."""
        return {
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "add_qkv_bias": True,
            "mrope_section": self.mrope_section,
        }
