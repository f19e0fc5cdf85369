"""A cost model from measured times, where they say enough; the analytic one where they do not."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from loongforge.data.balance.step import CostModel
from loongforge.data.items import ItemError, numbers

LEAST_R2 = 0.9
"""Times that a fit explains less of are noise, or depend on something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What explains times: seconds for each unit of every kind of work, and seconds in any case."""

    rates: np.ndarray
    """float64 `[kinds]`, none negative."""
    constant: float
    r2: float
    """Share of the variance of the times that is explained; 1 is all of it."""

    @property
    def explains(self) -> bool:
        """Whether that is enough to deal by."""
        return self.r2 >= LEAST_R2 and bool(self.rates.any())


def fit(work: ArrayLike, seconds: ArrayLike) -> Fit:
    """Least squares without negative rates, with a constant.

    `work` `[rows, kinds]` is what a rank did in a step, `seconds` `[rows]` how long it was busy, **before** it waited
    for others: a row for each rank and step. Without the constant, fixed time would be taken for work. `ItemError` for
    fewer rows than unknowns, or numbers that are negative or not finite.
    """
    amounts, times = numbers(work, "work", dims=2).astype(np.float64), numbers(seconds, "seconds").astype(np.float64)
    amounts = amounts.reshape(len(amounts), -1)
    if len(amounts) != len(times) or len(times) <= amounts.shape[1] + 1:
        raise ItemError(
            f"{len(amounts)} rows of work and {len(times)} times: give one time for each row, and more rows than the "
            f"{amounts.shape[1] + 1} unknowns."
        )
    scale = np.maximum(amounts.max(axis=0), 1e-300)
    known = np.concatenate([amounts / scale, np.ones((len(times), 1))], axis=1)
    found = nonnegative(known, times)
    spread = float(((times - times.mean()) ** 2).sum())
    left = float(((times - known @ found) ** 2).sum())
    return Fit(rates=found[:-1] / scale, constant=float(found[-1]), r2=1 - left / spread if spread else 0.0)


def nonnegative(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises |matrix x - right|: Lawson and Hanson, "Solving Least Squares Problems" (1974), 23."""
    count = matrix.shape[1]
    x, free = np.zeros(count), np.zeros(count, dtype=bool)
    small = 1e-12 * max(1.0, float(np.abs(matrix.T @ right).max()))
    for _ in range(3 * count):
        slope = matrix.T @ (right - matrix @ x)
        slope[free] = -np.inf
        if free.all() or slope.max() <= small:
            break
        free[int(slope.argmax())] = True
        while True:
            tried = np.zeros(count)
            tried[free] = np.linalg.lstsq(matrix[:, free], right, rcond=None)[0]
            if tried[free].min() > 0:
                break
            falling = free & (tried <= 0)
            step = float((x[falling] / np.maximum(x[falling] - tried[falling], 1e-300)).min())
            x = x + step * (tried - x)
            free &= x > 1e-15 * max(1.0, float(x.max()))
            x[~free] = 0.0
            if not free.any():
                break
        x = tried if free.any() else x
    return x


@dataclass(frozen=True, slots=True)
class FittedCost:
    """Seconds of documents and items: rates for tokens, for squared lengths and for what the encoder costs."""

    fit: Fit
    base: CostModel
    """Says how items of unequal size compare."""

    def foundation(self, lengths: ArrayLike) -> np.ndarray:
        """As `CostModel.foundation`."""
        tokens = numbers(lengths, "lengths").astype(np.float64)
        return tokens * (self.fit.rates[0] + self.fit.rates[1] * tokens)

    def encoder(self, grids: ArrayLike) -> np.ndarray:
        """As `CostModel.encoder`."""
        return self.fit.rates[2] * self.base.encoder(grids)


def fitted(base: CostModel, work: ArrayLike, seconds: ArrayLike) -> CostModel:
    """`base` with rates from times, or `base` itself, which a warning says, when the fit explains too little of them.

    `work` `[rows, 3]`: tokens, the sum of squared lengths, and the sum of `base.encoder` of what a rank computed in a
    step; `seconds` as in `fit`.
    """
    found = fit(work, seconds)
    if found.rates.shape != (3,):
        raise ItemError(f"work has {len(found.rates)} columns: give tokens, squared lengths and the encoder's cost.")
    if not found.explains:
        logging.getLogger(__name__).warning(
            "costs are not fitted: %.2f of the variance of the times is explained, %.1f is needed. The model's own "
            "arithmetic is kept.",
            found.r2,
            LEAST_R2,
        )
        return base
    return FittedCost(found, base)
