"""`assign` and `rebalance` on the steps of four mixes, against the package `binpacking` in the same run.

    uv run --with binpacking python bench/balance.py [--ranks 8 128 1024] [--micro-batches 1 4] [--seeds 5] [--python]

Checks first that every item is dealt once, that no rank is over its cap, that two calls and the search in Python agree.
`ratio` is the greatest load relative to `bound`, what no assignment can undercut; `moved` the tokens that are not where
they were loaded. Costs are `L + L^2 / 16800` of lengths in tokens. Times are CPU time from a list to lists, in ms.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from length_mix import CAPACITY, MIXES, Samples, load

from loongforge.data import solve
from loongforge.data.balance import assign, bound, deal, rebalance


def timed(call: Callable[..., list[list[int]]], *arguments: Any, repeats: int = 3) -> tuple[list[list[int]], float]:
    """Result and milliseconds of CPU time."""
    best, result = float("inf"), []
    for _ in range(repeats):
        began = time.process_time()
        result = call(*arguments)
        best = min(best, time.process_time() - began)
    return result, best * 1e3


def check(dealt: list[list[int]], count: int, ranks: int) -> None:
    """Every item once, a list for each rank."""
    assert len(dealt) == ranks, f"{len(dealt)} lists for {ranks} ranks"
    assert sorted(item for items in dealt for item in items) == list(range(count)), "not every item once"


def ratio(costs: np.ndarray, dealt: list[list[int]], ranks: int) -> float:
    """Greatest load relative to the bound."""
    return max(costs[items].sum() for items in dealt) / bound(costs, ranks)


def peer() -> Callable[..., list[list[int]]] | None:
    """binpacking's greedy number partitioning, None where it is not installed."""
    if importlib.util.find_spec("binpacking") is None:
        return None
    import binpacking

    partition: Any = binpacking.to_constant_bin_number
    return lambda costs, ranks: [list(rank) for rank in partition(dict(enumerate(costs)), ranks)]


def agree(mix: str) -> None:
    """Both searches give the same, twice."""
    samples, home = load(mix, 16, 4, 0)
    costs, cap = samples.foundation(), 4 * CAPACITY
    both = np.stack([costs, samples.encoder()], axis=1)

    def results() -> list[Any]:
        return [assign(costs, 16), assign(both, 16), rebalance(costs, 16, home, samples.tokens, cap)]

    found = results()
    assert found == results(), "two calls differ"
    chosen, deal.solver = deal.solver, lambda: solve.Python()
    assert found == results(), "the search in Python differs"
    deal.solver = chosen


def row(mix: str, ranks: int, micro_batches: int, seeds: int) -> str:
    """One line of the table, means over the seeds; times of the last."""
    seen: list[tuple[float, ...]] = []
    for seed in range(seeds):
        samples, home = load(mix, ranks, micro_batches, seed)
        costs, cap = samples.foundation(), micro_batches * CAPACITY
        values, sizes, homes = costs.tolist(), samples.tokens.tolist(), home.tolist()
        last = seed == seeds - 1
        anew, anew_ms = timed(assign, values, ranks, repeats=3 if last else 1)
        near, near_ms = timed(rebalance, values, ranks, homes, sizes, cap, repeats=3 if last else 1)
        for dealt in (anew, near):
            check(dealt, len(values), ranks)
        assert max(samples.tokens[items].sum() for items in near) <= cap, "over the cap"
        loaded = [np.flatnonzero(home == rank).tolist() for rank in range(ranks)]
        theirs, their_ms = float("nan"), float("nan")
        if last and len(values) <= 15000 and (call := peer()):
            dealt, their_ms = timed(call, values, ranks, repeats=1)
            theirs = ratio(costs, dealt, ranks)
        seen.append(
            (
                ratio(costs, loaded, ranks),
                ratio(costs, anew, ranks),
                ratio(costs, near, ranks),
                moved(samples, near, home),
            )
        )
    means = np.mean(seen, axis=0)
    return (
        f"| {mix} | {micro_batches} | {ranks} | {len(values)} | {means[0]:.3f} | {means[1]:.5f} | {anew_ms:.2f} "
        f"| {means[2]:.4f} | {max(one[2] for one in seen):.4f} | {100 * means[3]:.2f} % | {near_ms:.1f} "
        f"| {theirs:.5f} | {their_ms:.0f} |"
    )  # fmt: skip


def moved(samples: Samples, dealt: list[list[int]], home: np.ndarray) -> float:
    """Share of the tokens that are elsewhere than before."""
    owner = np.empty(len(home), dtype=np.int64)
    for rank, items in enumerate(dealt):
        owner[items] = rank
    return float(samples.tokens[owner != home].sum() / samples.tokens.sum())


def vector_row(mix: str, ranks: int) -> str:
    """Encoder and foundation dealt together, by the foundation alone, and by their sum; four micro-batches."""
    samples, home = load(mix, ranks, 4, 0)
    costs = np.stack([samples.foundation(), samples.encoder()], axis=1)
    owners = [home, *(deal.owners(one, ranks) for one in (costs[:, 0], costs.sum(axis=1), costs))]
    told = []
    for owner in owners:
        loads = np.stack([np.bincount(owner, column, ranks) for column in costs.T], axis=1)
        mean = costs.sum() / ranks
        told.append(f"{loads.max(axis=0).sum() / mean:.3f} / {loads.sum(axis=1).max() / mean:.3f}")
    return f"| {mix} | {ranks} | {len(home)} | {' | '.join(told)} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128, 512, 1024])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=MIXES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--python", action="store_true", help="time the search in Python")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    solve.solver()
    for mix in options.mixes:
        agree(mix)
    if options.python:
        deal.solver = lambda: solve.Python()
    columns = ("mix", "mb", "ranks", "items", "loaded", "assign", "ms", "rebalance", "worst", "moved", "ms")
    print(f"| {' | '.join((*columns, 'binpacking', 'ms'))} |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for mix in options.mixes:
        for micro_batches in options.micro_batches:
            for ranks in options.ranks:
                print(row(mix, ranks, micro_batches, options.seeds), flush=True)
    print("\nmax of encoder + max of foundation / max of the sum, relative to the mean of all:")
    print("| mix | ranks | items | loaded | foundation alone | sum | both |\n|---|---|---|---|---|---|---|")
    for mix in ("sft_mix", "video_heavy"):
        for ranks in options.ranks:
            print(vector_row(mix, ranks), flush=True)


if __name__ == "__main__":
    main()
