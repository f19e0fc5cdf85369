"""Items to ranks: every item once, near the bound and near the optimum, the same in C++ and in Python."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loongforge.core.errors import DataError
from loongforge.data import solve
from loongforge.data.balance import assign, bound, deal, rebalance
from loongforge.data.items import ItemError

NATIVE = Path(__file__).parents[1] / "native"


@pytest.fixture(params=["native", "python"])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both searches in turn."""
    chosen = solve.solver() if request.param == "native" else solve.Python()
    monkeypatch.setattr(deal, "solver", lambda: chosen)


def cases(count: int) -> Iterator[tuple[np.random.Generator, list[float], int]]:
    """Seeded costs of four kinds, and ranks; more ranks than items, ties and zeros among them."""
    for number in range(count):
        generator = np.random.default_rng(number)
        items, ranks = int(generator.integers(0, 90)), int(generator.integers(1, 14))
        costs = [
            generator.lognormal(0, 1.5, items),
            generator.integers(0, 6, items),
            np.round(100 * generator.pareto(1.2, items)),
            generator.random(items) * (generator.random(items) > 0.5),
        ][number % 4]
        yield generator, costs.tolist(), ranks


def greatest(costs: Any, dealt: list[list[int]]) -> float:
    return max((float(np.asarray(costs)[items].sum()) for items in dealt), default=0.0)


def all_once(dealt: list[list[int]], items: int, ranks: int) -> bool:
    return len(dealt) == ranks and sorted(itertools.chain(*dealt)) == list(range(items))


def on_both(monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `call` or its error, which is the same with both searches and when called again."""
    found: list[Any] = []
    for chosen in (solve.solver(), solve.Python(), solve.solver()):
        monkeypatch.setattr(deal, "solver", lambda chosen=chosen: chosen)
        try:
            found.append(call(*arguments))
        except ItemError as error:
            found.append(str(error))
    assert found[0] == found[1] == found[2]
    return found[0]


def compiled() -> bool:
    return solve.solver().__class__ is not solve.Python


@pytest.mark.skipif(not compiled(), reason="this installation has no native core: it was built without a compiler")
def test_both_searches_deal_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    for generator, costs, ranks in cases(200):
        items = len(costs)
        assert all_once(on_both(monkeypatch, assign, costs, ranks), items, ranks)
        both = np.stack([costs, generator.random(items) * (generator.random(items) > 0.4)], axis=1)
        assert all_once(on_both(monkeypatch, assign, both, ranks), items, ranks)
        tokens, home = generator.integers(0, 100, items), generator.integers(0, ranks, items)
        cap = max(100, int(tokens.sum() / ranks * generator.uniform(1.0, 1.6)))
        dealt = on_both(monkeypatch, rebalance, costs, ranks, home, tokens, cap)
        if isinstance(dealt, str):
            assert "raise the cap" in dealt
        else:
            assert all_once(dealt, items, ranks)
            assert greatest(tokens, dealt) <= cap


@pytest.mark.skipif(not compiled(), reason="this installation has no native core: it was built without a compiler")
def test_both_searches_deal_a_large_step_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long exchanges, several for one among them."""
    for seed in range(3):
        tokens, home = loaded(16, 4, seed, 1.03)
        costs = cost(tokens)
        assert len(on_both(monkeypatch, assign, costs, 16)) == 16
        assert len(on_both(monkeypatch, rebalance, costs, 16, home, tokens, 4 * CAP)) == 16


@pytest.mark.skipif(not compiled(), reason="this installation has no native core: it was built without a compiler")
def test_the_native_core_is_that_of_these_sources() -> None:
    digest = hashlib.blake2b(b"".join(file.read_bytes() for file in sorted(NATIVE.iterdir())), digest_size=8)
    module: Any = solve.solver()
    assert module.source == digest.hexdigest(), "uv sync --reinstall-package loongforge-data builds it again"


def test_without_the_native_core_python_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, solve.NATIVE, None)  # importing it fails
    solve.solver.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert assign([3, 2, 1], 2) == [[0], [1, 2]]
            assert assign([3, 2, 1], 2) == [[0], [1, 2]]
    finally:
        solve.solver.cache_clear()
    (record,) = caplog.records
    assert "without its native core" in record.getMessage()
    assert "in Python, with the same results" in record.getMessage()


CAP = 32768


def loaded(ranks: int, micro_batches: int, seed: int, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of a step, mean around 2000, packed as they come, and the rank of each."""
    generator = np.random.default_rng([seed, ranks, micro_batches])
    drawn = np.exp(np.log(1193) + sigma * generator.standard_normal(60 * ranks * micro_batches))
    space, pack, packs = CAP, 0, []
    tokens = np.clip(drawn, 16, CAP).astype(np.int64)
    for length in tokens.tolist():
        if length > space:
            space, pack = CAP, pack + 1
        space -= length
        packs.append(pack)
    kept = np.array(packs) < ranks * micro_batches
    return tokens[kept], np.array(packs)[kept] % ranks


def cost(tokens: np.ndarray) -> np.ndarray:
    """Linear work and attention that is as dear at 16,800 tokens."""
    return tokens + tokens.astype(np.float64) ** 2 / 16800


@pytest.mark.usefixtures("search")
class TestAssign:
    def test_nothing_one_rank_and_more_ranks_than_items(self) -> None:
        assert assign([], 3) == [[], [], []]
        assert assign(np.zeros((0, 2)), 2) == [[], []]
        assert assign([5, 1, 3], 1) == [[0, 1, 2]]
        assert sorted(assign([2.0, 1.0], 4)) == [[], [], [0], [1]]

    def test_equal_and_zero_costs_are_dealt_evenly(self) -> None:
        assert sorted(map(len, assign([7] * 12, 4))) == [3, 3, 3, 3]
        assert sorted(map(len, assign([0] * 12, 4))) == [3, 3, 3, 3]
        assert sorted(map(len, assign(np.zeros((12, 2)), 4))) == [3, 3, 3, 3]

    def test_arrays_and_lists_of_any_number_give_the_same(self) -> None:
        costs = [5, 3, 3, 2, 2, 1]
        found = assign(costs, 2)
        for other in (np.array(costs, dtype=np.int32), np.array(costs, dtype=np.float32), [float(c) for c in costs]):
            assert assign(other, 2) == found
        assert assign([1e-300 * c for c in costs], 2) == assign([1e300 * c for c in costs], 2) == found

    def test_close_to_the_optimum_where_that_can_be_found(self) -> None:
        """Graham (1969): 4/3 - 1/(3 ranks) times the optimum at most."""
        worst = 1.0
        for seed in range(60):
            generator = np.random.default_rng(seed)
            ranks = int(generator.integers(2, 4))
            costs = generator.integers(1, 40, 8)
            every = np.array(list(itertools.product(range(ranks), repeat=8)))
            best = int(np.max([(every == rank) @ costs for rank in range(ranks)], axis=0).min())
            reached = greatest(costs, assign(costs, ranks))
            assert bound(costs, ranks) <= best * (1 + 1e-12) <= reached * (1 + 1e-12)
            assert reached <= (4 / 3 - 1 / (3 * ranks)) * best
            worst = max(worst, reached / best)
        assert worst < 1.08  # measured 1.061; without the swaps it is 1.17

    @pytest.mark.parametrize(("micro_batches", "most"), [(1, 1.001), (4, 1.0005)])
    def test_near_the_bound(self, micro_batches: int, most: float) -> None:
        ratios = []
        for ranks, sigma in itertools.product((8, 32), (0.4, 0.7, 1.03)):
            tokens, _ = loaded(ranks, micro_batches, 0, sigma)
            ratios.append(greatest(cost(tokens), assign(cost(tokens), ranks)) / bound(cost(tokens), ranks))
        assert np.mean(ratios) <= most
        assert min(ratios) >= 1 - 1e-12

    def test_components_are_balanced_together(self) -> None:
        generator = np.random.default_rng(0)
        tokens, _ = loaded(16, 4, 0, 1.03)
        encoder = np.where(generator.random(len(tokens)) < 0.5, generator.lognormal(5, 1, len(tokens)), 0)
        costs = np.stack([cost(tokens), encoder], axis=1)

        def ratios(dealt: list[list[int]]) -> list[float]:
            return [greatest(column, dealt) / bound(column, 16) for column in costs.T]

        assert max(ratios(assign(costs, 16))) < 1.01  # measured 1.002
        assert ratios(assign(costs.sum(axis=1), 16))[1] > 1.1  # balancing the sum leaves one of them


@pytest.mark.usefixtures("search")
class TestRebalance:
    @pytest.mark.parametrize("ranks", [8, 32])
    def test_little_moves_and_the_cap_holds(self, ranks: int) -> None:
        ratios, moved = [], []
        for seed, sigma in itertools.product(range(3), (0.7, 1.03)):
            tokens, home = loaded(ranks, 4, seed, sigma)
            costs = cost(tokens)
            dealt = rebalance(costs, ranks, home, tokens, 4 * CAP)
            assert greatest(tokens, dealt) <= 4 * CAP
            owner = owner_of(dealt, len(tokens))
            ratios.append(greatest(costs, dealt) / bound(costs, ranks))
            moved.append(tokens[owner != home].sum() / tokens.sum())
        assert np.mean(ratios) <= 1.022
        assert np.mean(moved) <= 0.06

    def test_what_is_even_stays(self) -> None:
        home = [1, 0, 1, 0]
        assert rebalance([4, 4, 4, 4], 2, home, [1] * 4, 2) == [[1, 3], [0, 2]]

    def test_a_rank_over_the_cap_gives_away(self) -> None:
        assert rebalance([1, 1, 1, 1], 2, [0, 0, 0, 0], [5, 5, 5, 5], 10) in ([[0, 1], [2, 3]], [[2, 3], [0, 1]])
        # nothing fits where it is looked for first: 6 + 4 and 5 + 5 are the only packs
        dealt = rebalance([1, 1, 1, 1], 2, [0, 0, 1, 1], [6, 5, 5, 4], 10)
        assert sorted(sorted(items) for items in dealt) == [[0, 3], [1, 2]]

    def test_several_go_for_one(self) -> None:
        """A long one may only come where as many tokens leave."""
        costs, tokens = [90, 60, *[12] * 8], [8, 6, *[2] * 8]
        dealt = rebalance(costs, 2, [0, 0, *[1] * 8], tokens, 16)
        assert greatest(tokens, dealt) <= 16
        assert greatest(costs, dealt) < 150

    def test_nothing_and_one_rank(self) -> None:
        assert rebalance([], 2, [], [], 10) == [[], []]
        assert rebalance([3, 1], 1, [0, 0], [2, 2], 4) == [[0, 1]]
        assert len(rebalance([3, 1], 5, [0, 0], [2, 2], 4)) == 5


def owner_of(dealt: list[list[int]], items: int) -> np.ndarray:
    owner = np.empty(items, dtype=np.int64)
    for rank, mine in enumerate(dealt):
        owner[mine] = rank
    return owner


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: assign([1.0, math.nan], 2), r"costs: item 1 has nan: every number must be finite and 0 or more"),
        (lambda: assign([1.0, 2.0, -3.0], 2), r"costs: item 2 has -3\.0"),
        (lambda: assign([math.inf], 2), r"costs: item 0 has inf"),
        (lambda: assign([[1, 1], [1, -1]], 2), r"costs: item 1 has -1"),
        (lambda: assign([1, None], 2), r"costs: item 1 has nan"),  # pyright: ignore
        (lambda: assign([1, "a"], 2), r"costs: item 1 has 'a': it must be a number"),  # pyright: ignore
        (lambda: assign([1, [2]], 2), r"costs: item 1 has \[2\]"),
        (lambda: assign(3, 2), r"costs have the shape \(\): give one number for each item"),
        (lambda: assign([1], 0), r"ranks=0 must be a whole number, 1 or more"),
        (lambda: assign([1], 1.5), r"ranks=1\.5"),  # pyright: ignore
        (lambda: rebalance([1, 1], 2, [0, 2], [1, 1], 9), r"home: item 1 has 2, which is none of the 2 ranks, 0 to 1"),
        (lambda: rebalance([1, 1], 2, [0, -1], [1, 1], 9), r"home: item 1 has -1"),
        (lambda: rebalance([1, 1], 2, [0, 1], [1, 10], 9), r"tokens: item 1 has 10, more than cap=9"),
        (lambda: rebalance([1, 1], 2, [0, 1], [1, 0.5], 9), r"tokens: item 1 has 0\.5: it must be a whole number"),
        (lambda: rebalance([1], 2, [0, 1], [1, 1], 9), r"1 costs, 2 homes and 2 tokens"),
        (lambda: rebalance([1] * 3, 2, [0, 1, 1], [6, 6, 6], 9), r"18 tokens need 3 ranks of cap=9 and there are 2"),
        (lambda: rebalance([1], 2, [0], [1], 9, aim=-1), r"aim=-1 must be between 0 and 1"),
    ],
)
def test_an_item_that_cannot_be_dealt_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ItemError, match=message) as caught:
        call()
    assert isinstance(caught.value, DataError)
    assert isinstance(caught.value, ValueError)


def test_bounds_of_known_cases() -> None:
    assert bound([], 3) == 0.0
    assert bound([0, 0], 3) == 0.0
    assert bound([6, 1, 1], 2) == 6.0  # the dearest
    assert bound([1.5] * 8, 4) == pytest.approx(3.0, abs=1e-12)  # the mean
    assert bound([5, 5, 5, 4], 3) == 9.0  # two of the first four share a rank
