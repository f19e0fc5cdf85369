"""Add adapters to the matrices of a Hugging Face directory, or take them out, tensor by tensor.

W + scale x B A in fp32, rounded once to W's own type. At no time is more than one matrix, its pair and their product in
memory.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loongforge.ckpt.hf.container import TYPES, ContainerWriter, Entry
from loongforge.ckpt.hf.directory import incomplete, locate, replaced
from loongforge.ckpt.hf.publish import cannot_write, publish, sync
from loongforge.ckpt.peft.config import WEIGHTS, read
from loongforge.ckpt.peft.move import locate as locate_adapters
from loongforge.core.checkpoint.sources import Prefixes, spelled, whole_of
from loongforge.core.errors import CheckpointError
from loongforge.core.lora.table import PEFT

KINDS = {name: dtype for dtype, name in TYPES.items()}
SIDES = re.compile(rf"{re.escape(PEFT)}(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What was done."""

    matrices: int
    """Matrices that changed."""
    bytes: int
    seconds: float


class Adapters:
    """Pairs of a PEFT directory by module, read when asked for."""

    def __init__(self, path: Path, base: Path, stack: ExitStack) -> None:
        self.config = read(path)
        whole = whole_of(base, "hf")
        self._spellings: Prefixes = whole.modules if whole else ()
        _, problems = locate_adapters(path)
        if problems:
            raise CheckpointError("\n".join(problems))
        self._file = _open(path / WEIGHTS, stack)
        self.modules: dict[str, dict[str, str]] = {}
        for name in self._file.keys():  # noqa: SIM118  no dictionary
            found = SIDES.fullmatch(name)
            if found is None:
                raise CheckpointError(
                    f"{path / WEIGHTS}: {name!r} is no A or B of a matrix, which alone can be merged."
                )
            self.modules.setdefault(found[1], {})[found[2]] = name
        if lacking := sorted(module for module, sides in self.modules.items() if len(sides) < 2):
            raise CheckpointError(f"{path / WEIGHTS}: {lacking[0]!r} lacks its A or its B. Download it again.")

    def module(self, tensor: str) -> str:
        """What the class in transformers calls the module of a tensor of the base."""
        name = tensor.removesuffix(".weight")
        return spelled(name, self._spellings) or name

    def shape(self, module: str) -> tuple[int, int]:
        """Of the matrix that the pair belongs to."""
        sides = self.modules[module]
        return self._shape(sides["B"])[0], self._shape(sides["A"])[1]

    def delta(self, module: str) -> torch.Tensor:
        """scale x B A, fp32 `[outputs, inputs]`."""
        left, right = (self._file.get_tensor(self.modules[module][side]).float() for side in "BA")
        return left @ right * self._scale(module, right.size(0))

    def _scale(self, module: str, rank: int) -> float:
        """As PEFT finds it: the first pattern that fits the end of the name."""
        patterns: dict[str, float] = self.config.get("alpha_pattern") or {}
        fitting = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = next(fitting, self.config.get("lora_alpha", self.config["r"]))
        return alpha / (sqrt(rank) if self.config.get("use_rslora") else rank)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())


def merge(base: Path, adapter: Path, target: Path, sign: int, tell: Callable[[str], None] = lambda _: None) -> Merged:
    """Write `base` + `sign` x the adapters to `target`, file by file as `base` is, so that it appears complete.

    Raises `CheckpointError`; `target` is as it was then. `tell` hears of every file.
    """
    start = time.perf_counter()
    with ExitStack() as stack:
        adapters = Adapters(adapter, base, stack)
        where, problems = locate(base)
        if problems:
            raise CheckpointError("\n".join(problems))
        files = {name: _open(base / name, stack) for name in sorted(set(where.values()))}
        _check(base, files, adapters)
        work = incomplete(target)
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            size = 0
            for name, tensors in files.items():
                size += _write(work / name, base / name, tensors, adapters, sign)
                tell(name)
            _copy_others(base, work)
            sync(work)
            publish(work, target)
        except OSError as error:
            raise CheckpointError(cannot_write(target, error)) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Merged(matrices=len(adapters.modules), bytes=size, seconds=time.perf_counter() - start)


def _check(base: Path, files: dict[str, Any], adapters: Adapters) -> None:
    """Every pair has its matrix, in a type that can be added to."""
    problems: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for file, tensors in files.items():
        for name in tensors.keys():  # noqa: SIM118
            part = tensors.get_slice(name)
            module = adapters.module(name)
            shapes[module] = tuple(part.get_shape())
            kind = part.get_dtype()
            if kind not in KINDS:
                problems.append(
                    f"{base / file}: {name!r} has type {kind}, which is quantised: train or convert the model first, "
                    "which writes plain numbers."
                )
    for module in adapters.modules:
        if module not in shapes:
            problems.append(f"{base}: has no {module}.weight, which the adapters change. Is it their base model?")
        elif shapes[module] != adapters.shape(module):
            problems.append(
                f"{base}: {module}.weight is {list(shapes[module])}, its adapter for {list(adapters.shape(module))}: "
                "is it their base model?"
            )
    if problems:
        more = f"\nand {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError("\n".join(problems[:3]) + more)


def _write(path: Path, source: Path, tensors: Any, adapters: Adapters, sign: int) -> int:
    """One file like `source`; the bytes of its tensors."""
    entries: list[Entry] = []
    for name in tensors.keys():  # noqa: SIM118
        part = tensors.get_slice(name)
        entries.append(Entry(name=name, dtype=KINDS[part.get_dtype()], shape=tuple(part.get_shape())))
    entries.sort(key=lambda entry: -entry.dtype.itemsize)  # every tensor begins at a multiple of its own width
    with ContainerWriter(path, entries) as writer:
        for entry in entries:
            try:
                tensor = tensors.get_tensor(entry.name)
            except SafetensorError as error:
                raise CheckpointError(f"{source}: {entry.name!r} cannot be read ({error}).") from error
            module = adapters.module(entry.name)
            if module in adapters.modules:
                tensor = (tensor.float() + sign * adapters.delta(module)).to(entry.dtype)
            writer.write(entry.name, tensor)
    return sum(entry.bytes for entry in entries)


def _copy_others(base: Path, work: Path) -> None:
    """Configuration, index, tokenizer: what is no weight stays as it is."""
    for entry in sorted(base.iterdir()):
        if entry.is_file() and entry.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
            shutil.copyfile(entry, work / entry.name)
            sync(work / entry.name)


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt ({error}). Download it again.") from error


def refuse_target(base: Path, target: Path) -> str | None:
    """Why a directory may not become the target; None when it may."""
    if target.resolve() == base.resolve():
        return f"{target}: is BASE itself, which stays as it is. Choose a new directory."
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        return f"{target}: is not empty. Choose a new directory."
    if replaced(target).exists():
        return f"{replaced(target)}: was left by an interrupted export. Move it away first."
    return None
