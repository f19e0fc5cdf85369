"""What is inside the six wheels, and what is not."""

from __future__ import annotations

import itertools
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

SHORTS = ("kernels", "core", "models", "data", "ckpt", "xpu")
CORE = f"loongforge/data/solve/_native{sysconfig.get_config_var('EXT_SUFFIX')}"


def strangers(files: set[str], short: str) -> set[str]:
    """Files of a wheel that lie outside its own part of the namespace."""
    own = (f"loongforge/{short}/", f"loongforge_{short}-")
    return {path for path in files if not path.startswith(own)}


@pytest.mark.parametrize("short", SHORTS)
def test_a_wheel_owns_its_part_of_the_namespace_and_no_more(built, short: str) -> None:
    assert strangers(built[short].files, short) == set()
    assert f"loongforge/{short}/__init__.py" in built[short].files


def test_no_file_lies_in_two_wheels(built) -> None:
    for one, other in itertools.combinations(SHORTS, 2):
        assert built[one].files & built[other].files == set()


@pytest.mark.parametrize("short", SHORTS)
def test_no_wheel_ships_the_namespace_itself(built, short: str) -> None:
    assert "loongforge/__init__.py" not in built[short].files
    assert "src/loongforge/__init__.py" not in built[short].sdist_files


def test_the_ownership_check_can_fail() -> None:
    files = {
        "loongforge/__init__.py",
        "loongforge/core/run.py",
        "tests/test_x.py",
        "loongforge_core-0.1.dist-info/RECORD",
    }
    assert strangers(files, "core") == {"loongforge/__init__.py", "tests/test_x.py"}


@pytest.mark.parametrize("short", SHORTS)
def test_the_wheel_holds_all_of_the_source(built, short: str) -> None:
    """Data files too: YAML, TOML, CUDA sources, READMEs of families. What is compiled is in the wheel alone."""
    source = {path.removeprefix("src/") for path in built[short].sdist_files if path.startswith("src/")}
    assert not any("__pycache__" in path or path.endswith(".so") for path in source)
    compiled = {path for path in built[short].code if path.endswith(".so")}
    assert built[short].code - compiled == source
    assert compiled <= {CORE} if short == "data" else not compiled


def test_the_native_core_is_built_where_there_is_a_compiler(built) -> None:
    """Its wheel then says for which Python and machine it is; the sdist has what it is made of."""
    assert {"hatch_build.py", "native/module.cpp"} <= built["data"].sdist_files
    if shutil.which("c++") and Path(sysconfig.get_path("include"), "Python.h").exists():
        assert CORE in built["data"].code
        assert built["data"].wheel.name.partition("-0.1.0-")[2].startswith(f"cp{sys.version_info.major}")
    else:
        assert built["data"].wheel.name.endswith("-py3-none-any.whl")


def test_without_a_compiler_the_wheel_is_pure(data_without_compiler: Path) -> None:
    assert data_without_compiler.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(data_without_compiler) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_every_configuration_travels_with_the_models(built) -> None:
    folders = {path.rpartition("/")[0] for path in built["models"].code if path.endswith("/spec.py")}
    assert folders
    for folder in folders:
        shipped = {path for path in built["models"].code if path.startswith(f"{folder}/configs")}
        assert any(path.endswith(".yaml") for path in shipped), f"{folder} ships no configuration"
