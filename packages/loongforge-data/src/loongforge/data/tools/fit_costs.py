"""`loongforge data fit-costs`: from a run's busy times to what the balancer `measured` reckons with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from loongforge.data.tools.options import subcommand

_DOES = """Fit what a token, a squared length and a unit of the encoder's arithmetic cost, and what every step costs in
any case, to the times that a run wrote with --balance-times: least squares without negative rates. Times that the rates
explain too little of are refused, with how much they explain."""
_EXAMPLES = """\
  loongforge train ... --train-iters 100 --balance-times times.jsonl
  loongforge data fit-costs times.jsonl --output costs.json
  loongforge train ... --balance measured --balance-costs costs.json
"""


def add_parser(verbs: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(verbs, "fit-costs", does=_DOES, examples=_EXAMPLES, help="costs from a run's own times")
    parser.add_argument("times", metavar="TIMES", help="file that --balance-times named")
    parser.add_argument("--output", required=True, metavar="FILE", help="where the costs go, as JSON")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from loongforge.data.balance.measured import KINDS, fit_costs

    found = fit_costs(Path(arguments.times), Path(arguments.output))
    rates = dict(zip(KINDS, found.rates.tolist(), strict=True))
    if arguments.json:
        print(json.dumps({"output": arguments.output, "rates": rates, "constant": found.constant, "r2": found.r2}))
        return 0
    print(f"{arguments.output}: {found.r2:.1%} of the variance is explained by")
    print(f"  {rates['tokens']:.3e} s for a token")
    print(f"  {rates['squares']:.3e} s for a squared token of a document")
    print(f"  {rates['encoder']:.3e} s for a FLOP of the encoder")
    print(f"  {found.constant:.3f} s for every step")
    return 0
