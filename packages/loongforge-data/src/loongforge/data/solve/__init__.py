"""The searches behind `balance` and `pack`: in C++ where the wheel was built with a compiler, in Python otherwise.

Both take the same steps over the same integers, so they give the same answer; Python needs 5 to 100 times as long.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Protocol, cast

import numpy as np

from loongforge.data.solve import packs, ranks

NATIVE = "loongforge.data.solve._native"
"""The module that the build hook of the wheel makes."""


class Solver(Protocol):
    """What both offer. Arrays are int64; items are sorted by cost or length, largest first, none is negative."""

    def assign(self, costs: np.ndarray, ranks: int, goal: int, look: int) -> np.ndarray:
        """As `ranks.assign`."""
        ...

    def spread(self, costs: np.ndarray, ranks: int) -> np.ndarray:
        """As `ranks.spread`."""
        ...

    def rebalance(
        self, costs: np.ndarray, held: ranks.Held, ranks: int, cap: int, aim: int, accept: int, look: int
    ) -> np.ndarray:
        """As `ranks.rebalance`."""
        ...

    def fit(self, lengths: np.ndarray, capacity: int, every: int) -> tuple[np.ndarray, np.ndarray]:
        """As `packs.fit`."""
        ...


class Python:
    """The searches without a compiler."""

    assign = staticmethod(ranks.assign)
    spread = staticmethod(ranks.spread)
    rebalance = staticmethod(ranks.rebalance)
    fit = staticmethod(packs.fit)


@functools.cache
def solver() -> Solver:
    """The native one, or the one in Python after a warning that says why; once in a process."""
    logger = logging.getLogger(__name__)
    try:
        native = importlib.import_module(NATIVE)
    except ImportError as error:
        reason = (
            "loongforge-data was installed without its native core, for want of a C++ compiler"
            if isinstance(error, ModuleNotFoundError)
            else f"the native core of loongforge-data cannot be loaded ({error})"
        )
        logger.warning(
            "%s: balancing and packing run in Python, with the same results, 5 to 100 times slower. Install the "
            "package again where c++ is on the PATH.",
            reason,
        )
        return Python()
    logger.info("balancing and packing run in C++: %s", native.__file__)
    return cast(Solver, native)
