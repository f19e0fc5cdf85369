"""The images that estimates assume, because a plan reads no data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from loongforge.core.plan.plan import Plan

SHARE = 0.5
"""Tokens of a sequence that are image features."""
LARGEST = 1024
"""Features of one image, where the sequence has room for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBudget:
    """Images of one sequence: all alike, half of its tokens."""

    features: int
    """Features of one image."""
    grid: tuple[int, int, int]
    """Its patches: time, height, width."""
    images: int
    """Images per sequence; a part of one would take a turn of its own when ranks share them out."""

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """The assumption for a plan with an encoder."""
        assert plan.encoder_geometry is not None, "asked of models with an encoder only"
        room = max(1, int(SHARE * plan.seq_length))
        height = math.isqrt(min(room, LARGEST))
        width = min(room, LARGEST) // height
        side = plan.encoder_geometry.spatial_merge_size
        return cls(
            features=height * width,
            grid=(1, height * side, width * side),
            images=max(1, round(room / (height * width))),
        )

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return math.prod(self.grid)

    def __str__(self) -> str:
        """`2 images of 1024 features per sequence`."""
        return f"{self.images} image{'' if self.images == 1 else 's'} of {self.features} features per sequence"
