"""Costs fitted to a run's own times: from its file of busy times to a file of rates, and to a balancer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from loongforge.core.data.work import identity
from loongforge.core.errors import ConfigError, DataError
from loongforge.core.plan.plan import Plan
from loongforge.data.balance.cost import AnalyticCost
from loongforge.data.balance.fit import LEAST_R2, Fit, FittedCost, fit
from loongforge.data.balance.step import StepBalancer
from loongforge.data.items import ItemError

KINDS = ("tokens", "squares", "encoder")
"""Kinds of work in a file of times, each of which has a rate."""


def fit_costs(times: Path, output: Path) -> Fit:
    """Fit rates to `times`, which `data.balance_times` wrote, and write them to `output`.

    `DataError` when a line is damaged, when there are too few, or when the rates explain less than `LEAST_R2` of the
    variance: such times would deal worse than the model's own arithmetic.
    """
    about, rows = _read(times)
    try:
        found = fit([[row[kind] for kind in KINDS] for row in rows], [row["seconds"] for row in rows])
    except ItemError as error:
        raise DataError(f"{times}: {error} Train more steps with --balance-times.") from error
    if not found.explains:
        raise DataError(
            f"{times}: rates for {', '.join(KINDS)} explain {found.r2:.2f} of the variance of {len(rows)} times, "
            f"{LEAST_R2} is needed; nothing is written. Steps may be too alike or the machine too busy: measure more "
            "steps of unequal samples, or keep --balance analytic."
        )
    rates = dict(zip(KINDS, found.rates.tolist(), strict=True))
    told = {"about": about, "rows": len(rows), "rates": rates, "constant": found.constant, "r2": found.r2}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror or error}.") from error
    return found


def _read(times: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    try:
        lines = times.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {times}: {error.strerror or error}.") from error
    about: dict[str, Any] | None = None
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if about is None:
                about = dict(value["about"])
            else:
                rows.append({name: float(value[name]) for name in (*KINDS, "seconds")})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{times}:{number}: no line of a file that --balance-times wrote ({error!r}).") from error
    if about is None:
        raise DataError(f"{times} is empty: train with --balance-times {times} first.")
    return about, rows


def open_measured(plan: Plan) -> StepBalancer:
    """The balancer `measured`: as `analytic`, by the rates in `data.balance_costs`."""
    given = plan.config.data.balance_costs
    if given is None:
        raise ConfigError(
            "data.balance=measured needs --balance-costs FILE, which loongforge data fit-costs writes from the times "
            "of a run with --balance-times."
        )
    found, about = _costs(Path(given))
    mine = identity(plan)
    if unlike := [name for name in mine if about.get(name) != mine[name]]:
        name = unlike[0]
        raise ConfigError(
            f"data.balance_costs={given} was measured with {name}={about.get(name)!r}, this run has {mine[name]!r}: "
            "measure this model and layout, or take --balance analytic."
        )
    return StepBalancer(plan, FittedCost(found, AnalyticCost(plan)), of_rank=True)


def _costs(path: Path) -> tuple[Fit, dict[str, Any]]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        rates = np.array([told["rates"][kind] for kind in KINDS], dtype=np.float64)
        found = Fit(rates=rates, constant=float(told["constant"]), r2=float(told["r2"]))
        about = dict(told["about"])
    except OSError as error:
        raise ConfigError(f"data.balance_costs: cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"data.balance_costs: {path} is no file that loongforge data fit-costs wrote ({error!r})."
        ) from error
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates) or not rates.any():
        raise ConfigError(f"data.balance_costs: {path} has rates {rates.tolist()}: none may be negative, nor all zero.")
    return found, about
