"""What a sample costs, in model FLOPs, from the geometry of the model: known before the first step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from loongforge.core.plan.compute import encoder_flops, flops_per_token
from loongforge.core.plan.plan import Plan
from loongforge.data.items import numbers

_LONG = 1 << 20
"""Attention is linear in the length of a document for each token; any long one shows by how much."""


@dataclass(frozen=True, slots=True)
class AnalyticCost:
    """FLOPs, forward and backward, that a plan's model spends on a sample; frozen components count as they run.

    Encoder and foundation are in the same unit, so that they may be added, or balanced as two components.
    """

    plan: Plan

    def foundation(self, lengths: ArrayLike) -> np.ndarray:
        """Of documents of `lengths` `[documents]` tokens, float64: `a L + b L^2`.

        Every token passes the matrices (a), and sees half of its own document on average (b), not those packed beside
        it: Chowdhery et al., "PaLM" (2022), appendix B, with experts and other attention as `flops_per_token` has it.
        """
        tokens = numbers(lengths, "lengths").astype(np.float64)
        linear = flops_per_token(self.plan, 0)
        return tokens * (linear + tokens * ((flops_per_token(self.plan, _LONG) - linear) / _LONG))

    def encoder(self, grids: ArrayLike) -> np.ndarray:
        """Of images and videos of `grids` `[items, 3]` = (t, h, w) patches, float64; zeros without an encoder.

        Attention sees a frame, or a window of it in the layers that have windows; never the whole video. The tiles of a
        large image are items of their own.
        """
        shapes, which = np.unique(np.asarray(grids, dtype=np.int64).reshape(-1, 3), axis=0, return_inverse=True)
        costs = np.array([encoder_flops(self.plan, shape) for shape in shapes.tolist()], dtype=np.float64)
        return costs[which.reshape(-1)]
