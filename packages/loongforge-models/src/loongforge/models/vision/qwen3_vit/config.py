"""The geometry of Qwen3-VL's vision encoder, and its two-way translation to a Hugging Face `vision_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, Self

from loongforge.core.errors import ConfigError
from loongforge.core.model.geometry import EncoderGeometry
from loongforge.models.parts.checks import wrong_counts, wrong_numbers
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.vision.checks import read_vision_config, wrong_heads, wrong_layers

NORM_EPSILON = 1e-6
"""A constant of the architecture; no `vision_config` has it."""

MODEL_TYPES = ("qwen3_vl_vision", "qwen3_vl", "qwen3_vl_moe", "qwen3_vl_moe_vision")

HF_KEYS = HFKeys(
    model_type=MODEL_TYPES[0],
    architecture="Qwen3VLVisionModel",
    fields={
        "depth": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_heads": "num_attention_heads",
        "in_channels": "in_channels",
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "spatial_merge_size": "spatial_merge_size",
        "num_position_embeddings": "position_embeddings",
        "deepstack_visual_indexes": "deepstack_layers",
        "initializer_range": "init_method_std",
    },
    required=("depth", "hidden_size", "intermediate_size", "num_heads", "deepstack_visual_indexes"),
    only={
        "hidden_act": ("gelu_pytorch_tanh", "the MLP of Qwen3-VL's encoder is GELU in its tanh form"),
        "rope_parameters": ({"rope_theta": 10000.0, "rope_type": "axial"}, "rows and columns turn with base 10000"),
    },
    ignored={"out_hidden_size": "width of the foundation, which the projector knows"},
)
"""Every key that transformers or a released checkpoint writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VitConfig:
    """Qwen3-VL's vision encoder: learned positions and rotation by row and column, LayerNorm, GELU, biases everywhere.

    Field names are Megatron's where it has them. Raises `ConfigError` with every impossible value at once.
    """

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the MLP between its two matrices."""
    num_attention_heads: int
    """Attention heads."""
    in_channels: int = 3
    """Colours of a picture."""
    patch_size: int = 16
    """Pixels per side of a patch."""
    temporal_patch_size: int = 2
    """Frames of a patch; a still image is repeated."""
    spatial_merge_size: int = 2
    """Patches per side of the square that becomes one token of the foundation."""
    position_embeddings: int = 2304
    """Learned positions, a square grid that is interpolated to the image."""
    deepstack_layers: tuple[int, ...] = ()
    """Layers, counted from 0, whose output goes to the first layers of the foundation as well."""
    init_method_std: float = 0.02
    """Standard deviation of fresh weights."""

    def __post_init__(self) -> None:
        family = "qwen3_vit"
        names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "in_channels", "patch_size")
        names = (*names, "temporal_patch_size", "spatial_merge_size", "position_embeddings")
        problems = wrong_counts(family, self, *names)
        problems += wrong_numbers(family, self, "init_method_std")
        if not problems:
            problems += wrong_heads(family, self.hidden_size, self.num_attention_heads)
            problems += wrong_layers(family, "deepstack_layers", self.deepstack_layers, self.num_layers)
            if isqrt(self.position_embeddings) ** 2 != self.position_embeddings:
                problems.append(
                    f"{family}: position_embeddings={self.position_embeddings!r} must be a square number such as 2304."
                )
        if problems:
            raise ConfigError(*problems)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """The encoder that a `vision_config` describes; `ConfigError` names every key unknown or unsupported."""
        return cls(**read_vision_config(HF_KEYS, MODEL_TYPES, hf))

    def to_hf(self) -> dict[str, Any]:
        """The encoder's keys of `vision_config`, as released; the projector's `to_hf` adds `out_hidden_size`."""
        values: dict[str, Any] = {key: getattr(self, name) for key, name in HF_KEYS.fields.items()}
        values["deepstack_visual_indexes"] = list(self.deepstack_layers)
        return dict(sorted({**values, "hidden_act": "gelu_pytorch_tanh", "model_type": MODEL_TYPES[0]}.items()))

    def geometry(self) -> EncoderGeometry:
        """What the plan and the trainer need to know."""
        return EncoderGeometry(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            patch_dim=self.in_channels * self.temporal_patch_size * self.patch_size**2,
            spatial_merge_size=self.spatial_merge_size,
            normalization="LayerNorm",
            norm_epsilon=NORM_EPSILON,
            gated=False,
            patch_bias=True,
            linear_bias=True,
            position_embeddings=self.position_embeddings,
            deepstack_layers=self.deepstack_layers,
            init_method_std=self.init_method_std,
        )
