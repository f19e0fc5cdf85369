"""The geometry of the Qwen projector, and its part of a Hugging Face `vision_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from loongforge.core.errors import ConfigError
from loongforge.core.model.geometry import ProjectorGeometry
from loongforge.models.parts.checks import wrong_counts, wrong_numbers, wrong_switches

NORM_EPSILON = 1e-6
"""A constant of the architecture; no `vision_config` has it."""

NORMS = ("LayerNorm", "RMSNorm")


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenMlpAdapterConfig:
    """Squares of patches side by side, then linear, GELU, linear; the norm comes before the squares are made.

    An encoder with deepstack levels gets one more of these for each. Raises `ConfigError` with every impossible value.
    """

    input_size: int | None = None
    """Width of the encoder; taken from the encoder when unset."""
    output_size: int | None = None
    """Width of the foundation; taken from the foundation when unset."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "LayerNorm"
    """LayerNorm in Qwen3-VL, RMSNorm in Qwen2.5-VL."""
    deepstack_norm_after_merge: bool = True
    """Deepstack levels are normalised after their squares are made."""
    init_method_std: float = 0.02
    """Standard deviation of fresh weights."""

    def __post_init__(self) -> None:
        family = "qwen_mlp_adapter"
        stated = [name for name in ("input_size", "output_size") if getattr(self, name) is not None]
        problems = wrong_counts(family, self, *stated)
        problems += wrong_numbers(family, self, "init_method_std")
        problems += wrong_switches(family, self, "deepstack_norm_after_merge")
        if self.normalization not in NORMS:
            problems.append(f"{family}: normalization must be one of {', '.join(NORMS)}, got {self.normalization!r}.")
        if problems:
            raise ConfigError(*problems)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """The projector behind the encoder of a `vision_config`; the encoder's `from_hf` judges all its other keys."""
        lacking = [key for key in ("hidden_size", "out_hidden_size") if hf.get(key) is None]
        if lacking:
            raise ConfigError(*(f"config.json: {key!r} is missing in vision_config." for key in lacking))
        return cls(
            input_size=hf["hidden_size"],
            output_size=hf["out_hidden_size"],
            # Qwen2.5-VL's encoder has windows, Qwen3-VL's has learned positions.
            normalization="RMSNorm" if "fullatt_block_indexes" in hf else "LayerNorm",
            init_method_std=hf.get("initializer_range", 0.02),
        )

    def to_hf(self) -> dict[str, Any]:
        """The projector's key of `vision_config`; empty while its width follows the foundation's."""
        return {} if self.output_size is None else {"out_hidden_size": self.output_size}

    def geometry(self) -> ProjectorGeometry:
        """What the plan and the trainer need to know."""
        return ProjectorGeometry(
            input_size=self.input_size,
            output_size=self.output_size,
            normalization=self.normalization,
            norm_epsilon=NORM_EPSILON,
            deepstack_norm_after_merge=self.deepstack_norm_after_merge,
            init_method_std=self.init_method_std,
        )
