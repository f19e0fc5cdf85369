"""`loongforge plan`: what a run would need and do, without a device or a process group."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loongforge.core.cli.arguments import Parser, parser
from loongforge.core.cli.plan_table import GIB, show_table
from loongforge.core.config.run import RunConfig
from loongforge.core.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from loongforge.core.plan import Plan


def command(argv: list[str]) -> int:
    """Print the plan of the run that `argv` describes.

    Raises `ConfigError` for wrong arguments and `PlanError` for a layout that cannot run or does not fit.
    """
    options, rest = _parser().parse_known_args(argv)
    from loongforge.core.config import resolve

    config = resolve.resolve(rest)
    show(
        config,
        options.world or workers_asked(config),
        as_json=options.json,
        device_gib=options.device_memory,
        calibration=options.calibration,
    )
    return 0


def show(
    config: RunConfig,
    world: int,
    *,
    as_json: bool = False,
    device_gib: float | None = None,
    calibration: Path | None = None,
) -> None:
    """Print the plan of `config` on `world` ranks; `PlanError` when it needs more than `device_gib` GiB per rank.

    With a file of measurements, what a step takes on that device, and the error of that.
    """
    from loongforge.core.plan import Plan, report

    device_bytes = None if device_gib is None else int(device_gib * GIB)
    plan = Plan.of(config, world)
    found = report(plan, device_bytes)
    measured = _measured(plan, calibration) if calibration is not None else None
    if as_json:
        estimate = {} if measured is None else {"calibration": measured[1]}
        json.dump(found.as_json() | {"device_bytes": device_bytes} | estimate, sys.stdout, indent=2)
        print()
    else:
        show_table(found, device_gib)
        if measured is not None:
            print(measured[0])
    if device_gib is not None and found.peak_bytes > device_gib * GIB:
        raise PlanError(
            f"the fullest rank needs about {found.peak_bytes / GIB:.1f} GiB, the device has {device_gib:g}: use more "
            "tensor or pipeline parallel ranks, recompute, use_distributed_optimizer, or a smaller micro_batch_size."
        )


def _measured(plan: Plan, path: Path) -> tuple[str, dict[str, Any]]:
    """What a file of measurements says of a plan, as a line and as data."""
    from loongforge.core.plan.calibration import Calibration, Work

    found = Calibration.load(path)
    if found.precision != plan.config.train.precision:
        raise ConfigError(
            f"--calibration {path}: was measured in {found.precision}, and the run is in "
            f"{plan.config.train.precision}: give a file of that precision, or plan with --{found.precision}."
        )
    one = found.estimate(Work.of(plan))
    words = [f"{one.seconds:.3g} s per step without communication{_error(one.seconds_error)}"]
    if one.peak_bytes is not None:
        words.append(f"{one.peak_bytes / GIB:.2f} GiB on the fullest rank{_error(one.bytes_error)}")
    count = "one case" if len(found.cases) == 1 else f"{len(found.cases)} cases"
    line = f"measured   {', '.join(words)}: {found.device}, {found.date}, {count} of {found.side}"
    return line, asdict(one) | {"device": found.device, "date": found.date, "cases": len(found.cases)}


def _error(error: float | None) -> str:
    return " (error unknown)" if error is None else f" (error up to {error:.0%})"


def workers_asked(config: RunConfig) -> int:
    """Workers on all nodes as configured; one per node when nproc_per_node is unset."""
    return (config.launch.nproc_per_node or 1) * config.launch.nnodes


def _parser() -> Parser:
    options = parser(
        "plan",
        "--config-file run.yaml --world 64",
        "--model-name qwen3-0.6b --train-iters 1000 --tensor-model-parallel-size 2 --world 8 --device-memory 80",
        "--load Qwen3-0.6B/ --train-iters 100 --json",
    )
    own = "[--world N] [--json] [--device-memory GIB] [--calibration FILE]"
    options.usage = f"loongforge plan {own} [what `loongforge train --help` lists]"
    options.add_argument("--world", type=_ranks, metavar="N", help="ranks of the job (nproc_per_node x nnodes, or 1)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_argument(
        "--calibration", type=Path, metavar="FILE", help="say what a step takes, by what `bench step` has measured"
    )
    options.add_argument("--device-memory", type=_gib, metavar="GIB", help="refuse what needs more than this per rank")
    return options


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--world must be a whole number of at least 1, got {text!r}.")
    return int(text)


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"--device-memory must be a positive number of GiB, got {text!r}.")
    return value
