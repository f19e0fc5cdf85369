"""Lengths of sequences in numbers, as a histogram of text, and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loongforge.core.errors import DataError

INSTALL = "pip install 'loongforge-data[plot]'"
_BAR = 40
"""Characters of the longest bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """What there is to say about some lengths."""

    count: int
    total: int
    shortest: int
    median: int
    percentile_90: int
    percentile_99: int
    longest: int
    histogram: list[tuple[int, int, int]]
    """First and last length of each bin, powers of two apart, and how many have one of them."""

    @classmethod
    def of(cls, lengths: np.ndarray) -> Lengths:
        """Of int64 `[sequences]`, at least one."""
        ascending = np.sort(lengths)

        def at(share: float) -> int:
            return int(ascending[min(len(ascending) - 1, int(share * len(ascending)))])

        bits = np.array([int(length).bit_length() for length in (ascending[0], ascending[-1])])
        borders = [0 if bit == 0 else 1 << (bit - 1) for bit in range(bits[0], bits[1] + 2)]
        places = np.searchsorted(ascending, borders)
        bins = [
            (first, last - 1, int(counted))
            for first, last, counted in zip(borders, borders[1:], np.diff(places), strict=False)
        ]
        return cls(
            count=len(ascending),
            total=int(ascending.sum()),
            shortest=int(ascending[0]),
            median=at(0.5),
            percentile_90=at(0.9),
            percentile_99=at(0.99),
            longest=int(ascending[-1]),
            histogram=bins,
        )

    def lines(self, unit: str) -> list[str]:
        """The numbers and the histogram, to print."""
        numbers = (
            f"{unit}: {self.total} in all; shortest {self.shortest}, median {self.median}, 90 % {self.percentile_90}, "
            f"99 % {self.percentile_99}, longest {self.longest}"
        )
        most = max(counted for *_, counted in self.histogram)
        width = len(str(self.histogram[-1][1]))
        bars = [
            f"  {first:>{width}}-{last:<{width}} {'#' * -(-counted * _BAR // most):{_BAR}} {counted}"
            for first, last, counted in self.histogram
        ]
        return [numbers, *bars]


def draw(lengths: np.ndarray, seq_length: int | None, title: str, out: Path) -> None:
    """Draw how many sequences have which length, and how many tokens lie in them, into the PNG file `out`.

    The dashed line is `seq_length`. `DataError` when matplotlib is absent or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(f"--png needs matplotlib: {INSTALL}") from error
    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no pyplot state
    bins = np.geomspace(max(1, lengths.min()), max(2, lengths.max()) + 1, 60)
    for panel, weights, what in zip(figure.subplots(1, 2), (None, lengths), ("sequences", "tokens"), strict=True):
        panel.hist(lengths, bins=bins, weights=weights)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("length in tokens")
        panel.set_ylabel(what)
        panel.grid(alpha=0.3)
        if seq_length is not None:
            panel.axvline(seq_length, color="gray", linestyle="--", linewidth=1, label=f"--seq-length {seq_length}")
            panel.legend()
    figure.suptitle(title)
    try:
        figure.savefig(out, format="png")
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}.") from error
