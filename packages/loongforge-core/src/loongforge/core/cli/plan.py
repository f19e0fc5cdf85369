"""`loongforge plan`: what a run would need and do, without a device or a process group."""

from __future__ import annotations

import json
import sys

from loongforge.core.cli.arguments import Parser, parser
from loongforge.core.cli.plan_table import GIB, show_table
from loongforge.core.config.run import RunConfig
from loongforge.core.errors import ConfigError, PlanError


def command(argv: list[str]) -> int:
    """Print the plan of the run that `argv` describes.

    Raises `ConfigError` for wrong arguments and `PlanError` for a layout that cannot run or does not fit.
    """
    options, rest = _parser().parse_known_args(argv)
    from loongforge.core.config import resolve

    config = resolve.resolve(rest)
    show(config, options.world or workers_asked(config), as_json=options.json, device_gib=options.device_memory)
    return 0


def show(config: RunConfig, world: int, *, as_json: bool = False, device_gib: float | None = None) -> None:
    """Print the plan of `config` on `world` ranks; `PlanError` when it needs more than `device_gib` GiB per rank."""
    from loongforge.core.plan import Plan, report

    device_bytes = None if device_gib is None else int(device_gib * GIB)
    found = report(Plan.of(config, world), device_bytes)
    if as_json:
        json.dump(found.as_json() | {"device_bytes": device_bytes}, sys.stdout, indent=2)
        print()
    else:
        show_table(found, device_gib)
    if device_gib is not None and found.peak_bytes > device_gib * GIB:
        raise PlanError(
            f"the fullest rank needs about {found.peak_bytes / GIB:.1f} GiB, the device has {device_gib:g}: use more "
            "tensor or pipeline parallel ranks, recompute, use_distributed_optimizer, or a smaller micro_batch_size."
        )


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
    options.usage = "loongforge plan [--world N] [--json] [--device-memory GIB] [what `loongforge train --help` lists]"
    options.add_argument("--world", type=_ranks, metavar="N", help="ranks of the job (nproc_per_node x nnodes, or 1)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
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
