"""Compiles the native core into the wheel where there is a C++ compiler; without one the wheel is pure Python.

`CXX` names the compiler, as for every Python extension; `CXX=` (empty) builds without one.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODULE = "loongforge/data/solve/_native"
"""Path of the module in the wheel; `loongforge.data.solve.solver` imports it."""


def compiler() -> list[str] | None:
    """The command of a C++ compiler that is there, None without one."""
    configured = os.environ.get("CXX")
    candidates = [configured] if configured is not None else [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    for words in (shlex.split(candidate or "") for candidate in candidates):
        if words and shutil.which(words[0]):
            return words
    return None


def source_digest(folder: Path) -> str:
    """Identifies the sources in `folder`; the module carries it as `source`."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.iterdir()):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def compile_module(folder: Path, target: Path) -> str | None:
    """Compile `folder`/module.cpp to `target`. Returns why that is not possible, None when it is done."""
    import pybind11

    command = compiler()
    if command is None:
        return "there is no C++ compiler, or CXX names none"
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        return f"{headers} has no Python.h, which your system may have in a package python3-dev"
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-shared"]
    if sys.platform == "darwin":
        flags += ["-undefined", "dynamic_lookup"]
    defined = f'-DLOONGFORGE_SOURCE="{source_digest(folder)}"'
    words = [*command, *flags, f"-I{pybind11.get_include()}", f"-I{headers}", defined, str(folder / "module.cpp")]
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([*words, "-o", str(target)], capture_output=True, text=True)
    return f"{shlex.join(words)} ended with {done.returncode}\n{done.stderr}" if done.returncode else None


class NativeCore(BuildHookInterface):
    """Adds the module to a wheel, and to the source folder for an editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; where that is not possible, say so and leave the wheel without the module."""
        root = Path(self.root)
        name = MODULE + sysconfig.get_config_var("EXT_SUFFIX")
        self._folder = Path(tempfile.mkdtemp(prefix="loongforge-data-"))
        editable = version == "editable"
        target = root / "src" / name if editable else self._folder / name
        if not (editable and target.exists() and source_digest(root / "native").encode() in target.read_bytes()):
            target.unlink(missing_ok=True)
            if problem := compile_module(root / "native", target):
                self.app.display_warning(f"loongforge-data is built without its native core: {problem}")
                return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        if not editable:
            build_data["force_include"][str(target)] = name

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what is in the wheel by now."""
        shutil.rmtree(self._folder)
