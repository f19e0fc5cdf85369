"""`loongforge list`: what is registered, whose it is, and whether it can be used."""

from __future__ import annotations

import json

from loongforge.core.cli import arguments, inventory
from loongforge.core.cli.table import columns, spoken, wrapped
from loongforge.core.plugins import KINDS

SAID = ("role", "modality", "sizes", "device", "devices", "dtypes", "capability", "requires", "phases")
"""Details worth a line in a listing; `show` and `--json` have all of them."""


def command(argv: list[str]) -> int:
    """Print one kind, or every kind; 0."""
    parser = arguments.parser("list", "models", "kernels --json", "")
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"{', '.join(KINDS)}; every kind by default")
    parser.add_argument("--json", action="store_true", help="for programs: a list of objects, or one list a kind")
    asked = parser.parse_args(argv)
    kinds = (arguments.kind(asked.kind),) if asked.kind else KINDS
    found = {kind: inventory.rows(kind) for kind in kinds}
    if asked.kind == "models":
        found["models"] += inventory.whole_models()
    if asked.json:
        objects = {kind: [row.json() for row in rows] for kind, rows in found.items()}
        print(json.dumps(objects[asked.kind] if asked.kind else objects, indent=2))
        return 0
    for kind, rows in found.items():
        if not asked.kind:
            print(f"{kind}:")
        print("\n".join(text(rows)) if rows else "  none registered")
    return 0


def text(rows: list[inventory.Row]) -> list[str]:
    """Name, owner and state in columns; below each its summary and details."""
    heads = columns([(row.name, row.owner, row.state) for row in rows], indent="  ")
    lines: list[str] = []
    for head, row in zip(heads, rows, strict=True):
        lines.append(head)
        lines += wrapped(row.summary, indent="      ")
        said = [f"{name}: {spoken(row.details[name])}" for name in SAID if row.details.get(name)]
        lines += wrapped("; ".join(said), indent="      ")
    return lines
