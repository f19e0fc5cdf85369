"""The table of docs/families.md, from what the tests of this folder measured:

pytest integration/zoo --zoo-results zoo.json && python integration/zoo/table.py zoo.json

After a new family, `-k` may leave the others out: a family without results keeps its line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from case import LAYOUTS
from cases import CASES

from loongforge.core import plugins

PAGE = Path(__file__).parents[2] / "docs/families.md"
BEGIN, END = "<!-- table: integration/zoo/table.py -->", "<!-- end of table -->"
HEAD = "| family | sizes | reference | logits | gradients | ten steps | layouts |\n|---|---|---|---|---|---|---|"

Results = Mapping[str, Mapping[str, Any]]


def families() -> dict[str, list[str]]:
    """Every family with its cases."""
    found: dict[str, list[str]] = {}
    for name, case in CASES.items():
        found.setdefault(case.family, []).append(name)
    return found


def facts(family: str, cases: list[str]) -> tuple[str, str, str, str]:
    """Columns that do not depend on a measurement: family, sizes, reference, layouts."""
    sizes = ", ".join(plugins.load("models", family).sizes)
    own = any(CASES[name].reference for name in cases)
    kinds = sorted({CASES[name].config["architectures"][0] for name in cases if CASES[name].reference is None})
    reference = ", ".join([*(f"`{kind}`" for kind in kinds), *(["written in the tests"] if own else [])])
    proven = {layout for name in cases for layout in CASES[name].layouts}
    return f"`{family}`", sizes, reference, ", ".join(layout for layout in LAYOUTS if layout in proven)


def rows(results: Results, before: Mapping[str, str]) -> Iterator[str]:
    """One line for each family, the worst of all its cases and layouts; the line `before` of those not measured."""
    for family, cases in families().items():
        measured = [case for case in cases if {"parity", "steps"} <= results.get(case, {}).keys()]
        if not measured and f"`{family}`" in before:
            yield before[f"`{family}`"]
            continue
        whole = len(measured) == len(cases) and all(
            set(results[one]["parity"]) == {*CASES[one].layouts} for one in cases
        )
        assert whole, f"{family}: not every case and layout of it was measured; run all of its tests"
        name, sizes, reference, layouts = facts(family, cases)
        parity = [one for case in cases for one in results[case]["parity"].values()]
        worst = [max(one[what] for one in parity) for what in ("logits", "gradient")]
        steps = max(results[case]["steps"]["mean"] for case in cases)
        numbers = " | ".join(f"{number:.0e}" for number in (*worst, steps))
        yield f"| {name} | {sizes} | {reference} | {numbers} | {layouts} |"


def written(page: str, results: Results) -> str:
    """The page with the table of these results in its place."""
    above, _, rest = page.partition(BEGIN)
    assert rest, f"{PAGE} has no {BEGIN}"
    table, _, below = rest.partition(END)
    before = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| `")}
    return "\n".join([above + BEGIN, "", HEAD, *rows(results, before), "", END]) + below


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), json.loads(Path(sys.argv[1]).read_text())))
