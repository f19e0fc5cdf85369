"""The geometry of a LLaMA model, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from loongforge.core.errors import ConfigError
from loongforge.core.model.geometry import TransformerGeometry

FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tie_word_embeddings",
}
"""Key of `config.json` to our field."""

ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
"""Keys with the one value that this family computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """A LLaMA model: grouped-query attention, SwiGLU, RMSNorm, no biases."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the gated MLP."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads."""
    kv_channels: int
    """Width of one head."""
    vocab_size: int
    """Tokens."""
    max_position_embeddings: int = 2048
    """Longest sequence the model was made for."""
    norm_epsilon: float = 1e-5
    """Term added to the mean square in every RMSNorm."""
    rotary_base: float = 10000.0
    """Base of the rotary position frequencies."""
    tie_word_embeddings: bool = False
    """The output matrix is the embedding matrix."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """The model of a `config.json`; `ConfigError` when it asks for what this family does not compute."""
        problems = [f"config.json: {key} must be {ONLY[key]!r}." for key in ONLY if hf.get(key, ONLY[key]) != ONLY[key]]
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            problems.append(f"config.json: rope_type {rope['rope_type']!r} is not supported, only 'default'.")
        if problems:
            raise ConfigError(*problems)
        values = {name: hf[key] for key, name in FIELDS.items() if key in hf}
        values.setdefault("kv_channels", hf["hidden_size"] // hf["num_attention_heads"])
        return cls(**values, rotary_base=rope.get("rope_theta") or hf["rope_theta"])

    def to_hf(self) -> dict[str, Any]:
        """`config.json` of this model."""
        values = {key: getattr(self, name) for key, name in FIELDS.items()}
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        return {**kind, **values, **ONLY, "rope_theta": self.rotary_base}

    def geometry(self) -> TransformerGeometry:
        """What the plan and the trainer need to know."""
        values = {name: getattr(self, name) for name in FIELDS.values()}
        return TransformerGeometry(**values, rotary_base=self.rotary_base)
