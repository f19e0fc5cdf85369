"""Costs from times: the truth is found again, noise is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from loongforge.core.config.resolve import resolve
from loongforge.core.errors import ConfigError, DataError
from loongforge.core.plan import Plan
from loongforge.data.balance.fit import FittedCost, fit, fitted, nonnegative
from loongforge.data.balance.measured import KINDS, fit_costs, open_measured
from loongforge.data.items import ItemError

CROSSOVER = 16_800
"""Length at which attention costs as much as all matrices."""


class Patches:
    """Made for these tests."""

    def foundation(self, lengths: np.ndarray) -> np.ndarray:
        return np.asarray(lengths, dtype=np.float64)

    def encoder(self, grids: np.ndarray) -> np.ndarray:
        return np.asarray(grids, dtype=np.float64).prod(axis=1)


def measured(ranks: int, steps: int, seed: int, *, noise: float, constant: float = 0.3) -> tuple[np.ndarray, ...]:
    """Tokens, squares and encoder cost of every rank and step, and seconds by a truth of 20 us a token."""
    generator = np.random.default_rng(seed)
    lengths = np.exp(6.5 + generator.standard_normal((ranks * steps, 90))).clip(16, 32768)
    work = np.stack([lengths.sum(1), (lengths**2).sum(1), generator.lognormal(8, 0.5, ranks * steps)], axis=1)
    seconds = work @ [2e-5, 2e-5 / CROSSOVER, 1e-5] + constant
    return work, seconds * (1 + noise * generator.standard_normal(len(work)))


@pytest.mark.parametrize(("ranks", "within"), [(64, 0.05), (8, 0.20)])
def test_the_truth_is_found_again(ranks: int, within: float) -> None:
    """Nine steps with 1 % of noise and 300 ms of fixed time."""
    for seed in range(4):
        found = fit(*measured(ranks, 9, seed, noise=0.01))
        assert found.r2 > 0.97
        assert found.rates[0] / found.rates[1] == pytest.approx(CROSSOVER, rel=within)
    exact = fit(*measured(ranks, 9, 0, noise=0.0))
    assert exact.rates == pytest.approx([2e-5, 2e-5 / CROSSOVER, 1e-5], rel=1e-6)
    assert (exact.constant, exact.r2) == (pytest.approx(0.3, rel=1e-6), pytest.approx(1.0))


def test_without_its_constant_fixed_time_would_be_taken_for_work() -> None:
    work, seconds = measured(64, 9, 0, noise=0.01)
    through_zero = nonnegative(work / work.max(axis=0), seconds) / work.max(axis=0)
    assert through_zero[0] / through_zero[1] > 1.2 * CROSSOVER


def test_rates_are_never_negative() -> None:
    """Against every choice of unknowns that are left out: the best of those without a negative one."""
    for seed in range(60):
        generator = np.random.default_rng(seed)
        matrix, right = generator.random((7, 4)), generator.standard_normal(7)
        found = nonnegative(matrix, right)
        assert found.min() >= 0
        best = np.linalg.norm(right)
        for chosen in range(1, 16):
            columns = [column for column in range(4) if chosen >> column & 1]
            tried = np.linalg.lstsq(matrix[:, columns], right, rcond=None)[0]
            if tried.min() >= 0:
                best = min(best, np.linalg.norm(matrix[:, columns] @ tried - right))
        assert np.linalg.norm(matrix @ found - right) == pytest.approx(best, rel=1e-9)


def test_a_fit_that_explains_too_little_is_refused_and_said(caplog: pytest.LogCaptureFixture) -> None:
    base, generator = Patches(), np.random.default_rng(0)
    work, seconds = measured(8, 9, 0, noise=0.01)
    cost = fitted(base, work, seconds)
    assert isinstance(cost, FittedCost)
    assert cost.foundation([0, 100])[0] == 0
    assert cost.encoder(np.array([[1, 4, 6]]))[0] == pytest.approx(24 * cost.fit.rates[2])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert fitted(base, work, generator.permutation(seconds)) is base
    assert "costs are not fitted: 0." in caplog.text
    assert "0.9 is needed. The model's own arithmetic is kept." in caplog.text
    caplog.clear()
    assert fitted(base, work, np.full(len(work), 0.5)) is base, "as --log-interval 10 made them: nothing to explain"
    assert caplog.records


def test_too_few_rows_and_broken_times() -> None:
    with pytest.raises(ItemError, match="4 rows of work and 4 times: give one time for each row, and more rows than"):
        fit(np.ones((4, 3)), np.ones(4))
    with pytest.raises(ItemError, match="seconds: item 2 has nan"):
        fit(np.ones((9, 3)), [1, 1, float("nan"), *[1] * 6])
    with pytest.raises(ItemError, match="work has 2 columns"):
        fitted(Patches(), np.ones((9, 2)), np.ones(9))


def times_file(path: Path, rows: list[dict[str, float]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"about": {}}, *rows]))
    return path


def test_times_that_say_too_little_are_refused(tmp_path: Path) -> None:
    work, seconds = measured(4, 9, 0, noise=0.0)
    rows = [
        dict(zip((*KINDS, "seconds"), (*row, time), strict=True))
        for row, time in zip(work.tolist(), np.random.default_rng(0).permutation(seconds).tolist(), strict=True)
    ]
    output = tmp_path / "costs.json"
    with pytest.raises(
        DataError, match=r"explain 0\.\d+ of the variance of 36 times, 0.9 is needed; nothing is written"
    ):
        fit_costs(times_file(tmp_path / "times", rows), output)
    with pytest.raises(DataError, match=r"3 rows of work and 3 times: .* Train more steps with --balance-times"):
        fit_costs(times_file(tmp_path / "times", rows[:3]), output)
    with pytest.raises(
        DataError, match=r"times:2: no line of a file that --balance-times wrote \(KeyError\('squares'\)\)"
    ):
        fit_costs(times_file(tmp_path / "times", [{"tokens": 1.0}]), output)
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match=r"empty is empty: train with --balance-times"):
        fit_costs(tmp_path / "empty", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "data.balance=measured needs --balance-costs FILE"),
        ("{", "is no file that loongforge data fit-costs wrote"),
        ('{"rates": {"tokens": -1, "squares": 0, "encoder": 0}, "constant": 0, "r2": 1, "about": {}}', "none may be"),
        ('{"rates": {"tokens": 1, "squares": 0, "encoder": 0}, "constant": 0, "r2": 1, "about": {}}',
         "was measured with tp=None, this run has 1"),
    ],
)  # fmt: skip
def test_costs_that_do_not_fit_the_run(content: str | None, says: str, tmp_path: Path) -> None:
    words = ["--model-name", "qwen3_0_6b", "--train-iters", "1", "--seq-length", "64", "--balance", "measured"]
    if content is not None:
        (tmp_path / "costs.json").write_text(content)
        words += ["--balance-costs", str(tmp_path / "costs.json")]
    with pytest.raises(ConfigError) as error:
        open_measured(Plan.of(resolve(words, note=lambda _: None), 1))
    assert says in str(error.value)
