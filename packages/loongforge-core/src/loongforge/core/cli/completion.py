"""Shell completion, through Typer. Imported only while a shell completes or asks for its script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from loongforge.core import plugins
from loongforge.core.cli.inventory import rows, whole_models
from loongforge.core.cli.shell import VERBS
from loongforge.core.errors import PluginError


def complete(words: list[str]) -> int:
    """Answer a shell's request, or print or install its script; 0, or 1 when the shell is not known."""
    try:
        result = application()(args=words, prog_name="loongforge", standalone_mode=False)
    except typer.Exit as stop:
        return stop.exit_code
    return result if isinstance(result, int) else 0


def application() -> typer.Typer:
    """The verbs with what can be completed after them: kinds and names, otherwise files."""
    app = typer.Typer(add_completion=True, context_settings={"ignore_unknown_options": True})
    first = [name.partition(".")[0] for name in plugins.registered("commands")]  # `bench.mtp` is said in two words
    for name in dict.fromkeys([*VERBS, *first]):
        app.command(name)(_SHAPES.get(name, _with_files))
    return app


def kinds(incomplete: str) -> list[str]:
    """Kinds of plugins that start so."""
    return [kind for kind in plugins.KINDS if kind.startswith(incomplete)]


def names(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the kind already typed that start so."""
    kind = context.params.get("kind")
    try:
        found = [row.name for row in rows(kind)] if kind in plugins.KINDS else []
        found += [row.name for row in whole_models()] if kind == "models" else []
    except PluginError:  # LOONGFORGE_PLUGINS is wrong; Tab is not the place to say it, the command itself does
        return []
    return [name for name in found if name.startswith(incomplete)]


def _list(kind: Annotated[str, typer.Argument(autocompletion=kinds)] = "", json: bool = False) -> None:
    del kind, json


def _show(
    kind: Annotated[str, typer.Argument(autocompletion=kinds)],
    name: Annotated[str, typer.Argument(autocompletion=names)],
    json: bool = False,
) -> None:
    del kind, name, json


def _doctor(json: bool = False, quick: bool = False) -> None:
    del json, quick


def _with_files(files: Annotated[list[str], typer.Argument()] = []) -> None:  # noqa: B006 - Typer's own idiom, never changed
    del files


_SHAPES: dict[str, Callable[..., None]] = {"list": _list, "show": _show, "doctor": _doctor}
