"""The stretch of rotary positions that LLaMA 3.1 brought, as fields of a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loongforge.core.model.geometry import Llama3Scaling
from loongforge.models.parts.checks import wrong_counts, wrong_numbers
from loongforge.models.parts.decoder import Decoder
from loongforge.models.parts.rope import Rope

SCALING = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
"""Parameters of the `llama3` scaling and our names of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope(Decoder):
    """A decoder whose positions may be stretched as LLaMA 3.1 stretches them. A family adds its own to each method."""

    ROPE: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": (), "llama3": tuple(SCALING)}

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
        factors = () if self.rope_scaling_factor is None else ("rope_scaling_factor",)
        problems = wrong_counts(self.LABEL, self, "original_max_position_embeddings")
        return problems + wrong_numbers(self.LABEL, self, *factors, "low_freq_factor", "high_freq_factor")

    def own_contradictions(self) -> list[str]:
        """Wavelengths that would be stretched whole and not at all."""
        if self.low_freq_factor < self.high_freq_factor:
            return []
        return [
            f"{self.LABEL}: low_freq_factor={self.low_freq_factor!r} must be below "
            f"high_freq_factor={self.high_freq_factor!r}."
        ]

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """The stretch that a file describes, and what it lacks."""
        if rope.kind != "llama3":
            return {}, []
        lacking = [key for key in SCALING if rope.parameters.get(key) is None]
        scaling = {name: rope.parameters[key] for key, name in SCALING.items() if key not in lacking}
        return scaling, [f"config.json: the llama3 scaling of the positions lacks {key!r}." for key in lacking]

    def own_keys(self) -> dict[str, Any]:
        """`rope_scaling` of a released file."""
        scaling = {key: getattr(self, name) for key, name in SCALING.items()}
        return {"rope_scaling": None if self.rope_scaling_factor is None else {**scaling, "rope_type": "llama3"}}

    def own_geometry(self) -> dict[str, Any]:
        """The stretch as the trainer takes it."""
        if self.rope_scaling_factor is None:
            return {}
        scaling = Llama3Scaling(
            factor=self.rope_scaling_factor,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
            original_max_position_embeddings=self.original_max_position_embeddings,
        )
        return {"rope_scaling": scaling}
