"""`loongforge doctor`: can this machine train, with what, and if not, why not."""

from __future__ import annotations

import json
from collections.abc import Mapping

from loongforge.core.cli import arguments, examination
from loongforge.core.cli.table import columns, spoken, wrapped


def command(argv: list[str]) -> int:
    """Print the report; 0 when usable, 1 with its problems named."""
    parser = arguments.parser("doctor", "", "--quick", "--json > doctor.json")
    parser.add_argument("--json", action="store_true", help="for programs: one object")
    parser.add_argument("--quick", action="store_true", help="do not import torch: no accelerator names, 0.5 s")
    asked = parser.parse_args(argv)
    report = examination.examine(quick=asked.quick)
    if asked.json:
        print(json.dumps(report.json(), indent=2))
    else:
        print("\n".join(text(report)))
    return 1 if report.problems else 0


def text(report: examination.Report) -> list[str]:
    """The report for a reader: facts first, the verdict last."""
    lines: list[str] = []
    for title, facts in report.facts.items():
        pairs = facts.items() if isinstance(facts, Mapping) else enumerate(facts, start=1)
        lines += [
            f"{title}:",
            *(columns([(str(name), spoken(value)) for name, value in pairs], indent="  ") or ["  none"]),
        ]
    for title, found in (("warnings", report.warnings), ("problems", report.problems)):
        if found:
            lines.append(f"{title}:")
            lines += [line for one in found for line in wrapped(f"- {one}", indent="  ")]
    return [*lines, "not usable as it is" if report.problems else "usable"]
