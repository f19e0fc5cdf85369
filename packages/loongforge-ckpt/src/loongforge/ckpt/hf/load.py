"""Fill the model's parameters from a Hugging Face directory: every rank reads only the blocks it owns."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loongforge.ckpt.hf.directory import locate, read_config
from loongforge.ckpt.hf.parameters import Parameter, collect
from loongforge.ckpt.hf.quantised import FP8, SCALES, Dequantised, scale_shape
from loongforge.core.checkpoint.contract import MoveReport, WeightMove
from loongforge.core.errors import CheckpointError, ConfigError
from loongforge.core.model.pieces import Shape
from loongforge.core.model.quantisation import fp8_block

FLOATING = ("F64", "F32", "F16", "BF16")
Locate = Callable[[Path], tuple[dict[str, str], list[str]]]
SHOWN = 8
"""Names listed in one error before the rest is counted."""


@dataclass(slots=True, kw_only=True)
class Findings:
    """What one rank, and then all ranks together, know about the directory."""

    problems: list[str] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)
    orphans: set[str] = field(default_factory=set)
    used: dict[str, int] = field(default_factory=dict)
    """Bytes of every Hugging Face tensor that the model takes."""
    copies: set[str] = field(default_factory=set)
    """Tensors that hold one of those once more."""

    def add(self, other: Findings) -> None:
        """Unite with what another rank found."""
        self.problems += [problem for problem in other.problems if problem not in self.problems]
        self.missing |= other.missing
        self.orphans |= other.orphans
        self.used |= other.used
        self.copies |= other.copies

    def texts(self, move: WeightMove, names: Iterable[str]) -> list[str]:
        """One text for each kind of problem; `names` are all tensors of the directory."""
        patterns = [pattern for part in move.parts for pattern in part.table.ignored_hf]
        patterns += [one.hf for part in move.parts for one in part.table.left_out_hf]
        ignored = [re.compile(pattern) for pattern in patterns]
        known = self.used.keys() | self.copies
        unexpected = {
            name
            for name in names
            if move.whole and name not in known and not any(pattern.fullmatch(name) for pattern in ignored)
        }
        texts = list(self.problems)
        if self.orphans:
            texts.append(f"{_listed(self.orphans)} of the model: no rule in the weight table says where it comes from.")
        if self.missing:
            texts.append(f"{move.path}: lacks what the model needs: {_listed(self.missing)}.")
        if unexpected:
            texts.append(
                f"{move.path}: holds what the model has no place for: {_listed(unexpected)}. "
                "Does the model's configuration belong to these weights?"
            )
        return texts


class TensorFiles:
    """The safetensors files of a directory, mapped into memory and opened when first asked for."""

    def __init__(self, path: Path, stack: ExitStack, find: Locate = locate) -> None:
        self.path = path
        self.where, self.problems = find(path)
        self._stack = stack
        self._open: dict[str, Any] = {}
        if single := self.where.pop("*", None):
            handle = self._handle(single)
            self.where = {} if handle is None else dict.fromkeys(handle.keys(), single)

    def slice(self, name: str) -> Any | None:
        """Shape, type and blocks of a tensor, not yet read; None, with a problem noted, when its file is damaged.

        What is stored in fp8 is read as numbers.
        """
        stored = self._stored(name)
        return self._dequantised(name, stored) if stored is not None and stored.get_dtype() == FP8 else stored

    def _dequantised(self, name: str, values: Any) -> Dequantised | None:
        try:
            block = fp8_block(read_config(self.path).get("quantization_config"))
        except (ConfigError, CheckpointError) as error:
            self._note(str(error))
            return None
        tensor, shape = f"{self.path / self.where[name]}: {name!r}", tuple(values.get_shape())
        if block is None:
            self._note(f"{tensor} is fp8, and config.json has no quantization_config that says how to read it.")
        elif len(shape) < 2:
            self._note(f"{tensor} is fp8 of shape {list(shape)}; only matrices have blocks.")
        elif name + SCALES not in self.where:
            self._note(f"{tensor} is fp8 and its scales {name + SCALES!r} are absent. Download it again.")
        elif (scales := self._stored(name + SCALES)) is not None:
            has, needed = tuple(scales.get_shape()), scale_shape(shape, block)
            if has == needed and scales.get_dtype() in FLOATING:
                return Dequantised(values, scales, block)
            self._note(
                f"{self.path / self.where[name + SCALES]}: {name + SCALES!r} is {scales.get_dtype()} {list(has)}; "
                f"blocks of {block[0]} x {block[1]} of {list(shape)} need floating numbers {list(needed)}."
            )
        return None

    def _stored(self, name: str) -> Any | None:
        handle = self._handle(self.where[name])
        if handle is None:
            return None
        try:
            return handle.get_slice(name)
        except SafetensorError:
            self._note(f"{self.path / self.where[name]}: lacks {name!r}, which the index places there.")
            return None

    def _handle(self, file: str) -> Any | None:
        if file not in self._open:
            try:
                self._open[file] = self._stack.enter_context(safe_open(self.path / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                self._open[file] = None
                if (self.path / file).is_file():  # `locate` has named an absent one
                    self._note(f"{self.path / file}: truncated or corrupt ({error}). Download it again.")
        return self._open[file]

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


def load(move: WeightMove, find: Locate = locate) -> MoveReport:
    """Fill every parameter of every component, in its own type; padding rows of the vocabulary become zero.

    `find` says which file of the directory has which tensor.

    Files are memory-mapped, so that host memory holds no copy beyond the parameters themselves. Nothing is changed
    unless all ranks found everything in order; otherwise all of them raise the same `CheckpointError`.
    """
    start = time.perf_counter()
    world = move.world
    parameters: list[Parameter] = []
    mine = Findings()
    for part in move.parts:
        found, orphans = collect(part)
        parameters += found
        mine.orphans |= set(orphans)
        mine.copies |= {name for one in found for name in one.copies()}
    with ExitStack() as stack:
        files = TensorFiles(move.path, stack, find)
        parameters = inspect(parameters, files, mine)
        everyone = Findings()
        for one in world.gather(mine):
            everyone.add(one)
        if texts := everyone.texts(move, files.where):
            raise CheckpointError("\n".join(texts))
        failures = fill(parameters, files)
    if failures := world.agree(failures):
        raise CheckpointError("\n".join(failures))
    return MoveReport(
        tensors=len(everyone.used),
        bytes=sum(everyone.used.values()),
        seconds=time.perf_counter() - start,
        notes=(*_dequantised_note(move.path, everyone), *_left_out_notes(move, everyone, files.where)),
    )


def inspect(parameters: list[Parameter], files: TensorFiles, found: Findings) -> list[Parameter]:
    """Compare names, shapes and types of what these parameters need with the directory; reads headers only.

    The parameters as the directory stores them.
    """
    stored: list[Parameter] = []
    headers: dict[str, tuple[Shape, str] | None] = {}
    for parameter in parameters:
        # One rank speaks for all that share a parameter or hold a copy; the others can only have found problems.
        used = dict.fromkeys(parameter.hf_names(), 0) if parameter.speaks else {}
        try:
            shapes = parameter.hf_shapes()
        except ValueError as error:
            found.problems.append(f"parameter {parameter.name!r} does not fit its rule: {error}.")
            found.used |= used
            continue
        for name in shapes:
            if name not in headers:
                headers[name] = _header(name, files, found)
        parameter = parameter.stored_as({name: has[0] for name in shapes if (has := headers[name])})
        for name, shape in parameter.hf_shapes().items():
            if header := headers[name]:
                used |= _taken(name, header, files) if name in used else {}
                problems = _mismatch(f"{files.path / files.where[name]}: {name!r}", header[0], shape, header[1])
                found.problems += [problem for problem in problems if problem not in found.problems]
        found.used |= used
        stored.append(parameter)
    found.problems += files.problems
    return stored


def _header(name: str, files: TensorFiles, found: Findings) -> tuple[Shape, str] | None:
    """Shape and type of a tensor; None when it is not there, which is noted."""
    if name not in files.where:
        found.missing |= {name} if files.where else set()
        return None
    tensor = files.slice(name)
    return None if tensor is None else (tuple(tensor.get_shape()), tensor.get_dtype())


def _mismatch(tensor: str, has: Shape, needed: Shape, kind: str) -> list[str]:
    problems: list[str] = []
    if has != needed:
        problems.append(f"{tensor} has shape {list(has)}, the model needs {list(needed)}.")
    if kind not in (*FLOATING, FP8):
        problems.append(
            f"{tensor} has type {kind}, one of {', '.join(FLOATING)} is needed. "
            "Quantised weights cannot be trained; load the original checkpoint."
        )
    return problems


@torch.no_grad()
def fill(parameters: list[Parameter], files: TensorFiles) -> list[str]:
    """Copy every block into its place; returns what could not be read."""
    for parameter in parameters:
        covered = 0
        for name, blocks in parameter.pieces().items():
            tensor = files.slice(name)
            assert tensor is not None, f"{name} was there when it was inspected"
            for piece in blocks:
                try:
                    block = piece.of_hf(tensor)
                except (SafetensorError, OSError) as error:
                    return [f"{files.path / files.where[name]}: {name!r} cannot be read ({error})."]
                target = piece.of_parameter(parameter.tensor)
                target.copy_(block)
                covered += target.numel()
        if covered < parameter.tensor.numel():
            _zero_padding(parameter, covered)
    return []


def _zero_padding(parameter: Parameter, covered: int) -> None:
    """Rows behind the last token: no token reads them and no label names them."""
    rows = covered // (parameter.tensor.numel() // parameter.tensor.shape[0])
    parameter.tensor[rows:].zero_()


def _taken(name: str, header: tuple[Shape, str], files: TensorFiles) -> dict[str, int]:
    """Bytes of a tensor, and of its scales where it has them."""
    taken = {name: _bytes(*header)}
    if header[1] == FP8:
        scales: Any = files.slice(name + SCALES)
        taken[name + SCALES] = _bytes(tuple(scales.get_shape()), scales.get_dtype())
    return taken


def _dequantised_note(path: Path, found: Findings) -> Iterable[str]:
    if count := sum(name.endswith(SCALES) for name in found.used):
        yield f"{path}: {count} tensors are stored in fp8 with scales; read as numbers, and exports are not quantised."


def _left_out_notes(move: WeightMove, found: Findings, names: Iterable[str]) -> Iterable[str]:
    rest = [name for name in names if name not in found.used and name not in found.copies]
    for one in (one for part in move.parts for one in part.table.left_out_hf):
        pattern = re.compile(one.hf)
        if count := sum(pattern.fullmatch(name) is not None for name in rest):
            yield f"{move.path}: {count} tensors of {one.what} are left out; {one.remedy}."


def _bytes(shape: Shape, kind: str) -> int:
    count = {"F64": 8, "F32": 4, FP8: 1}.get(kind, 2)
    for size in shape:
        count *= size
    return count


def _listed(names: set[str]) -> str:
    ordered = sorted(names, key=_natural)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(repr(name) for name in ordered[:SHOWN]) + more


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
