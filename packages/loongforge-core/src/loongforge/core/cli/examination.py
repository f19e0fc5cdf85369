"""Gather what `loongforge doctor` reports. A problem keeps a run from starting; a warning is worth knowing."""

from __future__ import annotations

import os
import platform as interpreter
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from loongforge.core import env, plugins
from loongforge.core.cli import inventory
from loongforge.core.errors import PlatformError, PluginError
from loongforge.core.platform.choose import Choice, choose

WHEELS = tuple(f"loongforge-{name}" for name in ("kernels", "core", "models", "data", "ckpt", "xpu"))
LIBRARIES = (
    *("torch", "megatron-core", "triton", "transformer-engine", "numpy", "hydra-core", "pydantic", "safetensors"),
    *("tokenizers", "huggingface-hub", "transformers", "tensorboard", "wandb", "swanlab"),
)
TOOLS = ("ninja", "g++", "nvcc")
GIB = 2**30
FREE_DISK_GIB = 5
"""A checkpoint of a small model with its optimizer fits."""


@dataclass(slots=True, kw_only=True)
class Report:
    """What was found. Problems and warnings are sentences with a remedy."""

    facts: dict[str, Mapping[str, Any] | list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """As one object."""
        return {**self.facts, "warnings": self.warnings, "problems": self.problems, "usable": not self.problems}


def examine(*, quick: bool) -> Report:
    """Everything there is to say about this machine; `quick` leaves out what only an import of torch can tell."""
    report = Report()
    report.facts["machine"] = _machine(report)
    report.facts["wheels"] = _wheels(report)
    report.facts["libraries"] = {name: _version(name) or "not installed" for name in LIBRARIES}
    choice = _choose(report)
    report.facts["platform"] = _platform(choice)
    if not quick and choice:
        report.facts["torch"] = _torch(choice, report)
    report.facts["plugins"] = _plugins(report)
    report.facts["tools"] = _tools(report)
    report.facts["environment"] = env.settings()
    report.problems += [regular_package(folder) for folder in regular_packages(sys.path)]
    return report


def regular_packages(path: Iterable[str]) -> list[Path]:
    """Folders of an import path where `loongforge` is a regular package and not a part of the namespace."""
    folders = dict.fromkeys(Path(entry or ".").resolve() for entry in path)
    return [folder for folder in folders if (folder / "loongforge" / "__init__.py").is_file()]


def regular_package(folder: Path) -> str:
    """What is wrong with such a folder, and the remedy."""
    return (
        f"{folder / 'loongforge' / '__init__.py'} makes loongforge a regular package, which hides every wheel of ours "
        f"that is installed elsewhere. Take {folder} off PYTHONPATH, or uninstall the package that put the file there."
    )


def _machine(report: Report) -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    free = shutil.disk_usage(".").free / GIB
    if free < FREE_DISK_GIB:
        report.warnings.append(f"only {free:.1f} GiB of disk are free in {Path.cwd()}: a checkpoint may not fit.")
    return {
        "python": f"{interpreter.python_version()} at {sys.executable}",
        "os": interpreter.platform(),
        "libc": " ".join(interpreter.libc_ver()).strip() or "unknown",
        "cpu": _cpu_name(),
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory": f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
        "disk": f"{free:.1f} GiB free in {Path.cwd()}",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return interpreter.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else interpreter.machine()


def _wheels(report: Report) -> dict[str, str]:
    versions = {name: _version(name) for name in WHEELS}
    installed = {name: found for name, found in versions.items() if found}
    if len(set(installed.values())) > 1:
        said = ", ".join(f"{name} {found}" for name, found in installed.items())
        report.problems.append(f"loongforge wheels of different versions: {said}. Install the same version of each.")
    for name in installed:
        if lacking := plugins.unmet(distribution(name)):
            wanted = " ".join(map(repr, lacking))
            report.problems.append(f"{name} needs {', '.join(lacking)}: pip install {wanted}")
    return {name: found or "not installed" for name, found in versions.items()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _choose(report: Report) -> Choice | None:
    try:
        return choose()
    except (PlatformError, PluginError) as error:
        report.problems.append(str(error))
        return None


def _platform(choice: Choice | None) -> dict[str, str]:
    said = {"chosen": choice.name, "why": choice.reason} if choice else {"chosen": "none"}
    try:
        for plugin in plugins.usable("platforms"):
            available, reason = plugin.spec.probe()()
            said[f"{plugin.name} ({plugin.distribution})"] = f"{'here' if available else 'absent'}: {reason}"
    except PluginError as error:
        said["others"] = str(error)
    return said


def _torch(choice: Choice, report: Report) -> dict[str, Any]:
    """What torch itself says; the platform is asked for its devices, so that a vendor's runtime is in place."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of its own is absent
        report.problems.append(f"torch cannot be imported: {error}")
        return {}
    said: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
    if choice.spec.device == "cpu":
        return said
    try:
        count = choice.platform().device_count()
    except (PlatformError, PluginError) as error:
        report.problems.append(str(error))
        return said
    module = torch.get_device_module(choice.spec.device)
    said["accelerators"] = [module.get_device_name(number) for number in range(count)]
    if not count:
        report.problems.append(
            f"platform {choice.name!r} was chosen ({choice.reason}), but torch {torch.__version__} sees no device. "
            "Check the driver and torch's build, or set LOONGFORGE_PLATFORM=cpu."
        )
    return said


def _plugins(report: Report) -> dict[str, str]:
    said: dict[str, str] = {}
    try:
        for kind in plugins.KINDS:
            rows = inventory.rows(kind)
            ready = sum(row.state == "ready" for row in rows)
            said[kind] = f"{ready} of {len(rows)} ready"
            for row in rows:
                # a needed extra is an offer, not a fault; only what is broken deserves a warning
                if row.state.startswith("broken"):
                    report.warnings.append(f"{kind}: {row.name} from {row.owner} is {row.state}")
    except PluginError as error:
        report.problems += [str(error)] if str(error) not in report.problems else []
    return said


def _tools(report: Report) -> dict[str, str]:
    found = {tool: shutil.which(tool) or "not on PATH" for tool in TOOLS}
    absent = [tool for tool in ("ninja", "g++") if found[tool] == "not on PATH"]
    if absent:
        report.warnings.append(
            f"{' and '.join(absent)} not on PATH: extensions that torch compiles on first use cannot be built here."
        )
    return found
