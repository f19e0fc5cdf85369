"""`loongforge show`: everything a spec says, and where its files lie."""

from __future__ import annotations

import json
from typing import Any

from loongforge.core import plugins
from loongforge.core.cli import arguments, inventory
from loongforge.core.cli.shell import VERBS
from loongforge.core.cli.table import columns, spoken
from loongforge.core.errors import PluginError
from loongforge.core.plugins import KINDS, Plugin


def command(argv: list[str]) -> int:
    """Print one registration; 0, also when it is broken: its state says so."""
    parser = arguments.parser("show", "models qwen3", "platforms cuda --json", "models loongforge-models:qwen3")
    parser.add_argument("kind", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("name", metavar="NAME", help="as in loongforge list KIND; owner:name where two share a name")
    parser.add_argument("--json", action="store_true", help="for programs: one object")
    asked = parser.parse_args(argv)
    kind = arguments.kind(asked.kind)
    if kind == "commands" and asked.name in VERBS:
        row = next(row for row in inventory.rows(kind) if row.name == asked.name)
        described = row.json()
    else:
        described = describe(find(kind, asked.name))
    if asked.json:
        print(json.dumps(described, indent=2))
    else:
        kernels = described.pop("kernels", [])
        print("\n".join(columns([(name, spoken(value)) for name, value in described.items()])))
        for kernel in kernels:
            print("\n".join(["", *columns([(name, spoken(value)) for name, value in kernel.items()], indent="  ")]))
    return 0


def find(kind: str, name: str) -> Plugin:
    """The registration that a user means; a composition is a model too."""
    bare = name.rpartition(":")[2]
    if kind == "models" and bare not in plugins.registered("models") and bare in plugins.registered("compositions"):
        kind = "compositions"
    return plugins.pick(kind, name)


def describe(plugin: Plugin) -> dict[str, Any]:
    """What is known of a registration without importing what it stands for."""
    described: dict[str, Any] = {"name": plugin.name, "owner": plugin.owner, "state": plugin.state()}
    described["registered"] = f"loongforge.{plugin.kind}: {plugin.name} = {plugin.entry.value}"
    try:
        spec = plugin.spec
    except PluginError:  # `state` holds the reason
        return described
    if plugin.kind == "kernels":
        return {**described, "kernels": [row.json() for row in inventory.plugin_rows(plugin, shared=False)]}
    described["summary"] = spec.summary
    described["api"] = ".".join(map(str, spec.api))
    described |= inventory.details(spec)
    if spec.extra:
        described["extra"] = spec.extra
        described["missing"] = plugin.missing()
    folder = plugin.folder()
    described["folder"] = str(folder)
    if getattr(spec, "configs", None):
        configs = folder / spec.configs
        described["configs"] = str(configs)
        described["config_files"] = sorted(path.name for path in configs.glob("*.yaml"))
    readme = folder / "README.md"
    described["readme"] = str(readme) if readme.is_file() else None
    return described
