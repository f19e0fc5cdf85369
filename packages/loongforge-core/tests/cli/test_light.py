"""Promise: listing costs nothing. No verb that only looks, and no spec, may import what training needs."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "megatron", "numpy", "transformers", "hydra", "pydantic", "typer", "rich")
OWN_SECONDS = 0.3
LOOKING = [
    ["--help"],
    ["--version"],
    *(
        ["list", kind]
        for kind in ("models", "compositions", "platforms", "kernels", "data", "checkpoints", "trackers", "commands")
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


def seconds(code: str) -> tuple[float, float]:
    """Processor and wall seconds of a fresh interpreter that runs `code`: the best of five."""
    found: list[tuple[float, float]] = []
    for _ in range(5):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall))
    return min(cpu for cpu, _ in found), min(wall for _, wall in found)


def test_listing_models_takes_less_than_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    """Own time is the total less a bare interpreter; processor time is judged, for it does not wait for neighbours."""
    bare, bare_wall = seconds("pass")
    total, total_wall = seconds(MAIN.format(argv=["list", "models"]))
    with capsys.disabled():
        print(f"\nloongforge list models: {total - bare:.3f} s of its own (wall {total_wall - bare_wall:.3f} s)")
    assert total - bare < OWN_SECONDS
