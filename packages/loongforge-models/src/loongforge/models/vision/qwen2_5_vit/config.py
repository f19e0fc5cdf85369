"""The geometry of Qwen2.5-VL's vision encoder, and its two-way translation to a Hugging Face `vision_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from loongforge.core.errors import ConfigError
from loongforge.core.model.geometry import EncoderGeometry
from loongforge.models.parts.checks import wrong_counts, wrong_numbers
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.vision.checks import read_vision_config, wrong_heads, wrong_layers

NORM_EPSILON = 1e-6
"""A constant of the architecture; no `vision_config` has it."""

MODEL_TYPES = ("qwen2_5_vl_vision", "qwen2_5_vl")

HF_KEYS = HFKeys(
    model_type=MODEL_TYPES[0],
    architecture="Qwen2_5_VisionTransformerPretrainedModel",
    fields={
        "depth": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_heads": "num_attention_heads",
        "in_channels": "in_channels",
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "spatial_merge_size": "spatial_merge_size",
        "window_size": "window_size",
        "fullatt_block_indexes": "full_attention_layers",
        "tokens_per_second": "tokens_per_second",
        "initializer_range": "init_method_std",
    },
    required=("depth", "hidden_size", "intermediate_size", "num_heads", "fullatt_block_indexes"),
    only={
        "hidden_act": ("silu", "the MLP of Qwen2.5-VL's encoder is SwiGLU"),
        "in_chans": (3, "an older name of in_channels, for pictures of three colours"),
        "rope_parameters": ({"rope_theta": 10000.0, "rope_type": "axial"}, "rows and columns turn with base 10000"),
    },
    ignored={
        "out_hidden_size": "width of the foundation, which the projector knows",
        "spatial_patch_size": "says patch_size again",
    },
)
"""Every key that transformers or a released checkpoint writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2_5VitConfig:
    """Qwen2.5-VL's vision encoder: windows of patches in most layers, rotation by row and column, RMSNorm, SwiGLU.

    Field names are Megatron's where it has them. Raises `ConfigError` with every impossible value at once.
    """

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the gated MLP between its gate-and-up and down matrices."""
    num_attention_heads: int
    """Attention heads."""
    in_channels: int = 3
    """Colours of a picture."""
    patch_size: int = 14
    """Pixels per side of a patch."""
    temporal_patch_size: int = 2
    """Frames of a patch; a still image is repeated."""
    spatial_merge_size: int = 2
    """Patches per side of the square that becomes one token of the foundation."""
    window_size: int = 112
    """Pixels per side of an attention window."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers, counted from 0, in which a patch sees its whole frame instead of its window."""
    tokens_per_second: int = 4
    """Steps of the temporal position in one second of video; released models have 2."""
    init_method_std: float = 0.02
    """Standard deviation of fresh weights."""

    def __post_init__(self) -> None:
        family = "qwen2_5_vit"
        names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "in_channels", "patch_size")
        names = (*names, "temporal_patch_size", "spatial_merge_size", "window_size", "tokens_per_second")
        problems = wrong_counts(family, self, *names)
        problems += wrong_numbers(family, self, "init_method_std")
        if not problems:
            problems += wrong_heads(family, self.hidden_size, self.num_attention_heads)
            problems += wrong_layers(family, "full_attention_layers", self.full_attention_layers, self.num_layers)
            square = self.patch_size * self.spatial_merge_size
            if self.window_size % square:
                problems.append(
                    f"{family}: window_size={self.window_size!r} must be a multiple of patch_size x "
                    f"spatial_merge_size = {square}: a window holds whole squares of patches."
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
        values["fullatt_block_indexes"] = list(self.full_attention_layers)
        if self.in_channels == 3:
            values["in_chans"] = 3
        fixed = {"hidden_act": "silu", "model_type": MODEL_TYPES[0], "spatial_patch_size": self.patch_size}
        return dict(sorted({**values, **fixed}.items()))

    def geometry(self) -> EncoderGeometry:
        """What the plan and the trainer need to know."""
        return EncoderGeometry(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            patch_dim=self.in_channels * self.temporal_patch_size * self.patch_size**2,
            spatial_merge_size=self.spatial_merge_size,
            normalization="RMSNorm",
            norm_epsilon=NORM_EPSILON,
            gated=True,
            patch_bias=False,
            linear_bias=True,
            window_patches=(self.window_size // self.patch_size) ** 2,
            full_attention_layers=self.full_attention_layers,
            init_method_std=self.init_method_std,
        )
