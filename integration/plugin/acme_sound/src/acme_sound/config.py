"""The geometry of the ear, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from loongforge.core.model.geometry import EncoderGeometry


@dataclass(frozen=True, slots=True, kw_only=True)
class AcmeEarConfig:
    """A transformer over windows of samples, which rotates by the number of a window."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the MLP."""
    num_attention_heads: int
    """Attention heads."""
    window: int = 80
    """Samples of a patch."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """The ear of a `config.json`."""
        return cls(**{name: value for name, value in hf.items() if name != "model_type"})

    def to_hf(self) -> dict[str, Any]:
        """`config.json` of this ear."""
        return {"model_type": "acme_ear", **asdict(self)}

    def geometry(self) -> EncoderGeometry:
        """What the plan and the trainer need to know: every window becomes one token."""
        return EncoderGeometry(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            patch_dim=self.window,
            spatial_merge_size=1,
            normalization="LayerNorm",
            norm_epsilon=1e-6,
            gated=False,
            patch_bias=True,
            linear_bias=True,
        )
