"""`loongforge data cache`: tokenise and pack what a run will read, before it starts."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from loongforge.core.errors import DataError
from loongforge.data.tools.options import subcommand

if TYPE_CHECKING:
    from loongforge.core.plan import Plan

_DOES = """Tokenise, measure and pack the data of a run into its data cache, so that the run starts at once. Takes what
`loongforge train` takes: give the same command, with --world for the ranks that it will have. Needs no accelerator and
trains nothing. What is cached already stays as it is."""
_EXAMPLES = """\
  loongforge data cache --load Qwen3-0.6B --training-phase sft --data-path chats.jsonl --seq-length 8192 \\
    --train-iters 1000 --data-cache-path /shared/cache
  loongforge data cache --config-file run.yaml --world 64
"""


def add_parser(verbs: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(verbs, "cache", does=_DOES, examples=_EXAMPLES, help="build a run's data cache ahead of it")
    add_run_options(parser)
    parser.set_defaults(run=_run, takes_run=True)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What a subcommand that takes a run has besides `train`'s own arguments."""
    parser.usage = f"{parser.prog} [-h] [--world N] [--json] [what `loongforge train --help` lists]"
    parser.add_argument("--world", type=int, metavar="N", help="ranks of the run (nproc_per_node x nnodes, or 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def planned(words: list[str], world: int | None) -> Plan:
    """The plan of the run that `words` describe; `DataError` when there are no data, or no such files."""
    from loongforge.core.cli.plan import workers_asked
    from loongforge.core.cli.train import check_data_paths
    from loongforge.core.config import resolve
    from loongforge.core.plan import Plan

    if world is not None and world < 1:
        raise DataError(f"--world must be 1 or more, got {world}.")
    config = resolve.resolve(words)
    check_data_paths(config)
    return Plan.of(config, world or workers_asked(config))


def _run(arguments: argparse.Namespace) -> int:
    plan = planned(arguments.rest, arguments.world)
    from loongforge.core.data.ahead import open_ahead

    data, directories = open_ahead(plan)
    reports = [dict(source.report()) for source in (data.train, data.valid) if source is not None]
    if arguments.json:
        print(json.dumps({"cache": list(map(str, directories)), "data": reports}, indent=2))
        return 0
    for report in reports:
        print(", ".join(f"{name} {value}" for name, value in report.items()))
    print(f"in {' and '.join(map(str, directories))}; `loongforge train` with the same arguments reads it")
    return 0
