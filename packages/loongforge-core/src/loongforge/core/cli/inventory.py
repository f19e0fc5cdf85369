"""What is registered, as rows for `list`, `show` and `doctor`. Loads specs, never what is behind them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

from loongforge.core import plugins
from loongforge.core.cli.shell import VERBS
from loongforge.core.errors import PluginError
from loongforge.core.plugins import Plugin

_TOLD_APART = ("name", "api", "summary", "extra")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One registration, or one kernel of it."""

    name: str
    """As it is typed: `owner:name` where two owners share the name."""
    owner: str
    """Distribution and version."""
    state: str
    """`ready`, `needs pip install ...` or `broken: reason`."""
    summary: str
    details: dict[str, Any]
    """The spec's other fields that are plain data."""

    def json(self) -> dict[str, Any]:
        """As one flat object."""
        return {"name": self.name, "owner": self.owner, "state": self.state, "summary": self.summary, **self.details}


def rows(kind: str) -> list[Row]:
    """Every registration of a kind, the broken ones too."""
    found: list[Row] = []
    if kind == "commands":
        owner = f"{plugins.OWN} {plugins.version(plugins.OWN)}"
        found += [
            Row(name=verb, owner=owner, state="ready", summary=summary, details={}) for verb, summary in VERBS.items()
        ]
    for rivals in plugins.registered(kind).values():
        for plugin in rivals:
            found += plugin_rows(plugin, shared=len(rivals) > 1)
    return found


def whole_models() -> list[Row]:
    """Compositions as rows among the models: what `--model-name` may name besides a foundation."""
    return [replace(row, details={"role": "composition", **row.details}) for row in rows("compositions")]


def plugin_rows(plugin: Plugin, *, shared: bool) -> list[Row]:
    """The row of a registration; of a tuple of kernels, one row a kernel. `shared`: the name has several owners."""
    if plugin.kind == "commands" and plugin.name in VERBS:
        shared = True
    name = f"{plugin.distribution}:{plugin.name}" if shared else plugin.name
    state = plugin.state()
    try:
        spec = plugin.spec
    except PluginError:  # `state` holds the reason
        return [Row(name=name, owner=plugin.owner, state=state, summary="", details={})]
    if plugin.kind != "kernels":
        return [Row(name=name, owner=plugin.owner, state=state, summary=spec.summary, details=details(spec))]
    return [
        Row(
            name=f"{kernel.op}/{kernel.impl}",
            owner=plugin.owner,
            state=state if state != "ready" else kernel_state(kernel),
            summary=kernel.summary,
            details=details(kernel),
        )
        for kernel in spec
    ]


def kernel_state(kernel: Any) -> str:
    """`ready`, or what the distributions that one implementation needs ask for; the device is asked at run time."""
    lacking = [line for line in kernel.requires if not plugins.met(line)]
    return f"needs pip install {' '.join(map(repr, lacking))}" if lacking else "ready"


def details(spec: Any) -> dict[str, Any]:
    """The fields of a spec that are plain data and worth a line; code to be loaded later is left out."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name not in _TOLD_APART and isinstance(value, str | int | tuple | list):
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found
