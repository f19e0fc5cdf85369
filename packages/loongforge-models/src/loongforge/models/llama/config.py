"""The geometry of a LLaMA model, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loongforge.core.model.geometry import Llama3Scaling
from loongforge.models.parts.checks import wrong_counts, wrong_groups, wrong_numbers
from loongforge.models.parts.decoder import FIELDS, REQUIRED, Decoder, default_head
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.rope import KEYS, Rope

SCALING = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
"""Parameters of the `llama3` scaling and our names of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(Decoder):
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
    ROPE: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": (), "llama3": tuple(SCALING)}

    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int
    """Width of one head."""
    rope_scaling_factor: float | None = None
    """By how much long wavelengths of the rotary positions are stretched (3.1: 8, 3.2: 32); not at all when unset."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_max_position_embeddings / this are stretched whole."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_max_position_embeddings / this stay; between the two, the stretch is blended."""
    original_max_position_embeddings: int = 8192
    """Length that the model was trained at before stretching."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        counts = wrong_counts(self.LABEL, self, "num_query_groups", "kv_channels", "original_max_position_embeddings")
        factors = () if self.rope_scaling_factor is None else ("rope_scaling_factor",)
        return counts + wrong_numbers(self.LABEL, self, *factors, "low_freq_factor", "high_freq_factor")

    def own_contradictions(self) -> list[str]:
        """Values that do not go together."""
        problems = wrong_groups(self.LABEL, self)
        if self.low_freq_factor >= self.high_freq_factor:
            problems.append(
                f"{self.LABEL}: low_freq_factor={self.low_freq_factor!r} must be below "
                f"high_freq_factor={self.high_freq_factor!r}."
            )
        return problems

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """Width of a head, and the stretch of the positions."""
        values: dict[str, Any] = {"kv_channels": default_head(hf)}
        if rope.kind != "llama3":
            return values, []
        lacking = [key for key in SCALING if rope.parameters.get(key) is None]
        scaling = {name: rope.parameters[key] for key, name in SCALING.items() if key not in lacking}
        return values | scaling, [f"config.json: the llama3 scaling of the positions lacks {key!r}." for key in lacking]

    def own_keys(self) -> dict[str, Any]:
        """What every released file says besides; `head_dim` only where it is not what its absence means."""
        usual = self.kv_channels * self.num_attention_heads == self.hidden_size
        scaling = {key: getattr(self, name) for key, name in SCALING.items()}
        return {
            **({} if usual else {"head_dim": self.kv_channels}),
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rope_scaling": None if self.rope_scaling_factor is None else {**scaling, "rope_type": "llama3"},
        }

    def own_geometry(self) -> dict[str, Any]:
        """Grouped-query attention, and the stretch of the positions."""
        scaling = None
        if self.rope_scaling_factor is not None:
            scaling = Llama3Scaling(
                factor=self.rope_scaling_factor,
                low_freq_factor=self.low_freq_factor,
                high_freq_factor=self.high_freq_factor,
                original_max_position_embeddings=self.original_max_position_embeddings,
            )
        return {
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "rope_scaling": scaling,
        }
