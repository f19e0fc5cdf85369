"""Promise: listing costs nothing. No verb that only looks, and no spec, may import what training needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "megatron", "numpy", "transformers", "hydra", "pydantic", "typer", "rich")
MODULES = 300
"""Of the standard library and ours; torch alone brings more than a thousand."""
LOOKING = [
    ["--help"],
    ["--version"],
    *(
        ["list", kind]
        for kind in (
            *("models", "compositions", "platforms", "kernels", "data", "balancers", "checkpoints", "trackers"),
            "commands",
        )
    ),
    ["list", "--json"],
    ["show", "platforms", "cuda"],
    ["show", "kernels", "builtin", "--json"],
    ["doctor", "--quick"],
]
MAIN = "import sys; from loongforge.core.cli import main; main({argv!r})"
SPECS = """
import sys
from loongforge.core import plugins
for kind in plugins.KINDS:
    for rivals in plugins.registered(kind).values():
        for plugin in rivals:
            assert plugin.spec and plugin.folder()
"""


def heavy_after(code: str) -> list[str]:
    """Heavy libraries that a fresh interpreter has imported once it has run `code`."""
    report = f"\nimport sys\nprint('HEAVY', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("argv", LOOKING, ids=" ".join)
def test_looking_imports_nothing_heavy(argv: list[str]) -> None:
    assert heavy_after(MAIN.format(argv=argv)) == []


def test_no_spec_imports_anything_heavy() -> None:
    assert heavy_after(SPECS) == []


@pytest.mark.parametrize("library", ["numpy", "pydantic"])
def test_the_check_can_fail(library: str) -> None:
    assert library in heavy_after(f"import {library}")


def modules_after(code: str) -> int:
    """Modules that a fresh interpreter holds once it has run `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(len(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


def test_listing_models_imports_little() -> None:
    """A count instead of seconds, which a busy machine decides: 200 modules, 0.12 s in bench/startup.py."""
    assert modules_after(MAIN.format(argv=["list", "models"])) - modules_after("pass") < MODULES
