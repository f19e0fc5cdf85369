"""Who may import whom: import-linter's contracts, and the one door to what megatron-core keeps global."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GLOBAL = ("megatron.training", "megatron.core.parallel_state", "megatron.core.num_microbatches_calculator")
DOORS = ("loongforge/core/megatron/", "loongforge/core/platform/")


def lint(config: Path) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).parent / "lint-imports"
    return subprocess.run(
        [command, "--config", config, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_contracts_hold() -> None:
    done = lint(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert f"Contracts: {len(contracts)} kept, 0 broken." in done.stdout


@pytest.mark.parametrize(
    ("source", "forbidden"),
    [
        ("loongforge.**.spec", "loongforge.core.plugins"),
        ("loongforge.models", "torch"),
        ("loongforge.core", "megatron"),
    ],
)
def test_a_contract_can_fail(tmp_path: Path, source: str, forbidden: str) -> None:
    config = tmp_path / "importlinter.ini"
    config.write_text(
        "[importlinter]\nroot_packages =\n    loongforge.kernels\n    loongforge.core\n    loongforge.models\n"
        "include_external_packages = True\n"
        f"[importlinter:contract:one]\nname = one\ntype = forbidden\nsource_modules = {source}\n"
        f"forbidden_modules = {forbidden}\n"
    )
    done = lint(config)
    assert done.returncode == 1
    assert "0 kept, 1 broken." in done.stdout


def imported(source: str) -> set[str]:
    """Dotted names that a module imports, at its top or inside its functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def passes_the_door(names: set[str]) -> set[str]:
    """Those that reach for megatron's global state."""
    return {name for name in names if any(name == one or name.startswith(one + ".") for one in GLOBAL)}


def test_what_megatron_keeps_global_has_one_door() -> None:
    strangers: dict[str, set[str]] = {}
    for path in sorted(ROOT.glob("packages/*/src/loongforge/**/*.py")):
        inside = path.as_posix().partition("/src/")[2]
        if not inside.startswith(DOORS) and (found := passes_the_door(imported(path.read_text()))):
            strangers[inside] = found
    assert strangers == {}


@pytest.mark.parametrize(
    "source",
    [
        "import megatron.core.parallel_state as ps",
        "def f():\n    from megatron.core import parallel_state",
        "from megatron.training.arguments import parse_args",
    ],
)
def test_the_door_check_can_fail(source: str) -> None:
    assert passes_the_door(imported(source))


def test_the_environment_is_read_in_one_place() -> None:
    """`os.environ` is read in core/env.py alone."""
    readers = {
        path.as_posix().partition("/src/")[2]
        for path in ROOT.glob("packages/*/src/loongforge/**/*.py")
        if any(
            isinstance(node, ast.Attribute)
            and node.attr in ("environ", "getenv", "putenv")
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert readers <= {"loongforge/core/env.py"}
