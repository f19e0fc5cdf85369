"""The geometry of a dense Qwen3 model, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loongforge.models.parts.checks import wrong_counts, wrong_groups, wrong_sections, wrong_switches
from loongforge.models.parts.decoder import FIELDS, REQUIRED, Decoder
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.rope import KEYS, Rope, mrope_section, mrope_written


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Config(Decoder):
    """A dense Qwen3 model: grouped-query attention with per-head RMSNorm of query and key, SwiGLU, no biases.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "qwen3"
    KEYS: ClassVar[HFKeys] = HFKeys(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        fields={**FIELDS, "num_key_value_heads": "num_query_groups", "head_dim": "kv_channels"},
        required=(*REQUIRED, "num_key_value_heads"),
        only={
            "attention_bias": (False, "no released Qwen3 has biases"),
            "hidden_act": ("silu", "the MLP of Qwen3 is SwiGLU"),
            "use_sliding_window": (False, "every layer of a released Qwen3 attends to everything before it"),
        },
        ignored={
            "max_window_layers": "sliding window is off",
            "sliding_window": "sliding window is off",
        },
        special=(*KEYS, "layer_types"),
    )
    ROPE: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("mrope_section", "mrope_interleaved")}

    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int = 128
    """Width of one head, independent of the hidden size."""
    mrope_section: tuple[int, int, int] | None = None
    """Rotated pairs of a head for time, height and width, in a model that sees; ordinary positions when unset."""
    mrope_interleaved: bool = False
    """Frequencies of the sections take turns, as in Qwen3-VL, instead of standing in three blocks."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        counts = wrong_counts(self.LABEL, self, "num_query_groups", "kv_channels")
        return counts + wrong_switches(self.LABEL, self, "mrope_interleaved")

    def own_contradictions(self) -> list[str]:
        """Values that do not go together."""
        return wrong_groups(self.LABEL, self) + wrong_sections(self.LABEL, self)

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """The sections of the positions."""
        interleaved = bool(rope.parameters.get("mrope_interleaved", False))
        return {"mrope_section": mrope_section(rope.parameters), "mrope_interleaved": interleaved}, []

    def own_keys(self) -> dict[str, Any]:
        """What every released file says besides."""
        return {
            "attention_bias": False,
            "max_window_layers": self.num_layers,
            "rope_scaling": mrope_written(self.mrope_section, interleaved=self.mrope_interleaved),
            "sliding_window": None,
            "use_sliding_window": False,
        }

    def own_geometry(self) -> dict[str, Any]:
        """Grouped-query attention with head norms."""
        return {
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "qk_layernorm": True,
            "mrope_section": self.mrope_section,
            "mrope_interleaved": self.mrope_interleaved,
        }
