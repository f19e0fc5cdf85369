"""The geometry of the encoder, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from loongforge.core.errors import ConfigError
from loongforge.core.model.geometry import EncoderGeometry

FIELDS = {
    "depth": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_heads": "num_attention_heads",
    "patch_size": "patch_size",
    "num_positions": "position_embeddings",
}
"""Key of `config.json` to our field."""

CHANNELS, MERGE = 3, 2
"""Colours; patches per side of the square that the projector makes one feature of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AcmeVitConfig:
    """A vision transformer: learned positions, LayerNorm, GELU, biases, attention within an image."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the MLP."""
    num_attention_heads: int
    """Attention heads."""
    patch_size: int = 14
    """Pixels per side of a patch."""
    position_embeddings: int = 256
    """Learned positions, a square grid that is stretched over the image."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """The encoder of a `config.json`; `ConfigError` names every missing key."""
        if missing := sorted(FIELDS.keys() - hf.keys()):
            raise ConfigError(*(f"config.json: {key!r} is missing." for key in missing))
        return cls(**{name: hf[key] for key, name in FIELDS.items()})

    def to_hf(self) -> dict[str, Any]:
        """`config.json` of this encoder."""
        return {"model_type": "acme_vit", **{key: getattr(self, name) for key, name in FIELDS.items()}}

    def geometry(self) -> EncoderGeometry:
        """What the plan and the trainer need to know."""
        return EncoderGeometry(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            patch_dim=CHANNELS * self.patch_size**2,
            spatial_merge_size=MERGE,
            normalization="LayerNorm",
            norm_epsilon=1e-6,
            gated=False,
            patch_bias=True,
            linear_bias=True,
            position_embeddings=self.position_embeddings,
        )
