"""`pack` and `pack_stream` on four mixes of lengths, against the package `binpacking` and next fit in the same run.

    uv run --with binpacking python bench/pack.py [--items 1000000] [--python]

Checks first that every item is in one pack, that no pack is over the capacity, and that the search in Python gives the
same packs. `packs` are relative to `pack_bound`, what no packing can undercut. Times are CPU seconds from a list to
lists. binpacking is quadratic and packs the first 20,000 items only; its ratio is to the bound of those.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from length_mix import CAPACITY, MIXES, draw

from loongforge.data import pack as packing
from loongforge.data import solve
from loongforge.data.pack import pack, pack_bound, pack_stream

FEW = 20_000
"""Items of the peer, and of the comparison with the search in Python."""


def timed(call: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    """Result and the least CPU seconds."""
    best, result = float("inf"), None
    for _ in range(repeats):
        began = time.process_time()
        result = call()
        best = min(best, time.process_time() - began)
    return result, best


def check(packs: list[list[int]], lengths: np.ndarray) -> None:
    """Every item once, no pack over the capacity."""
    flat = np.array([item for items in packs for item in items])
    assert np.array_equal(np.sort(flat), np.arange(len(lengths))), "not every item once"
    ends = np.cumsum([0, *(len(items) for items in packs)])[:-1]
    assert np.add.reduceat(lengths[flat], ends).max() <= CAPACITY, "over the capacity"


def agree(lengths: list[int]) -> None:
    """Both searches give the same, twice."""
    found = pack(lengths, CAPACITY)
    assert found == pack(lengths, CAPACITY), "two calls differ"
    chosen, packing.solver = packing.solver, lambda: solve.Python()
    assert found == pack(lengths, CAPACITY), "the search in Python differs"
    packing.solver = chosen


def next_fit(lengths: list[int]) -> int:
    """Packs when each item goes into the last pack or a new one."""
    packs, space = 0, 0
    for length in lengths:
        if length > space:
            packs, space = packs + 1, CAPACITY
        space -= length
    return packs


def peer(lengths: list[int]) -> tuple[float, float]:
    """Packs relative to the bound, and seconds, of binpacking; nan where it is not installed."""
    if importlib.util.find_spec("binpacking") is None:
        return float("nan"), float("nan")
    import binpacking

    packs, seconds = timed(lambda: binpacking.to_constant_volume(lengths, CAPACITY))
    return len(packs) / pack_bound(lengths, CAPACITY), seconds


def row(mix: str, count: int, window: int) -> str:
    """One line of the table."""
    lengths = draw(mix, count, np.random.default_rng(0)).tokens
    values = lengths.tolist()
    agree(values[:FEW])
    least = pack_bound(lengths, CAPACITY)
    packs, seconds = timed(lambda: pack(values, CAPACITY), 3)
    stream, stream_seconds = timed(lambda: list(pack_stream(values, CAPACITY, window)))
    for made in (packs, stream):
        check(made, lengths)
    few = values[:FEW]
    theirs, their_seconds = peer(few)
    ours, our_seconds = timed(lambda: pack(few, CAPACITY), 3)
    return (
        f"| {mix} | {len(packs)} | {len(packs) / least:.5f} | {seconds:.3f} | {len(stream) / least:.5f} "
        f"| {stream_seconds:.2f} | {next_fit(values) / least:.4f} | {theirs:.5f} | {their_seconds:.2f} "
        f"| {len(ours) / pack_bound(few, CAPACITY):.5f} | {our_seconds:.4f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=MIXES)
    parser.add_argument("--python", action="store_true", help="time the search in Python")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    solve.solver()
    if options.python:
        packing.solver = lambda: solve.Python()
    print(f"{options.items} items; the last four columns: {FEW}")
    columns = ("mix", "packs", "pack", "s", "stream", "s", "next fit", "binpacking", "s", "pack", "s")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for mix in options.mixes:
        print(row(mix, options.items, options.window), flush=True)


if __name__ == "__main__":
    main()
