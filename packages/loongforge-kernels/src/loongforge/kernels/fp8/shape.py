"""What is measured and decided about: one matrix product of a linear layer's training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Op = Literal["fprop", "dgrad", "wgrad"]
"""`y = x w^T`, `dx = dy w` and `dw = dy^T x`."""
Recipe = Literal["tensorwise", "rowwise", "blockwise"]
"""What has a scale: a whole matrix, each row along the contraction, or 128 numbers of activations and squares of 128 of
weights, as in DeepSeek-V3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmShape:
    """A product of a layer with x `[m, k]`, w `[n, k]` for each group and y `[m, n]`, sizes that are the same in
    every op, whichever of them it contracts."""

    op: Op
    m: int
    """Tokens, those of all groups together: the size that changes from batch to batch."""
    n: int
    """Output features."""
    k: int
    """Input features."""
    groups: int = 1
    """Matrices, as experts on one rank are, among which tokens are dealt evenly."""
    recipe: Recipe

    def __post_init__(self) -> None:
        for name, allowed in (("op", get_args(Op)), ("recipe", get_args(Recipe))):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"GemmShape: {name} is {value!r}, one of {', '.join(allowed)} is needed.")
        for name in ("m", "n", "k", "groups"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"GemmShape: {name} is {value!r}, a whole number from 1 on is needed.")

    def line(self) -> str:
        """The shape in one line."""
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.op}, M {self.m}, N {self.n}, K {self.k}{groups}, {self.recipe}"
