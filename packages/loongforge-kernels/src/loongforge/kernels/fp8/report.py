"""Times of matrix products in BF16 and FP8 as they were measured, kept as JSON: facts, no verdicts."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from loongforge.kernels.fp8.shape import GemmShape

_FORMAT = "loongforge fp8 report 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Medians of one product, in milliseconds."""

    shape: GemmShape
    bf16_ms: float
    fp8_ms: float
    """The product with the quantisation of its activations and gradients, which every micro-batch does anew."""
    weight_ms: float
    """Quantisation of the weight, once for all micro-batches of a step; 0 for wgrad, which has none."""

    def __post_init__(self) -> None:
        for name in ("bf16_ms", "fp8_ms", "weight_ms"):
            value, least = getattr(self, name), "0" if name == "weight_ms" else "more than 0"
            if not math.isfinite(value) or value < 0 or (value == 0 and name != "weight_ms"):
                raise ValueError(f"{name} is {value}, {least} milliseconds are needed.")

    def speedup(self, micro_batches: int) -> float:
        """BF16's time over FP8's, with a share of the weight's quantisation."""
        return self.bf16_ms / (self.fp8_ms + self.weight_ms / micro_batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A product that could not be measured: the device or torch does not have it, or its result was wrong."""

    shape: GemmShape
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one run of `benchmark` found."""

    device: str
    """Name of the device, as torch gives it."""
    torch: str
    triton: str
    date: str
    """ISO 8601 with a time zone; of two reports on a shape the newer one counts."""
    engine: str
    emulated: bool
    """Whether FP8 was only imitated: such times decide nothing."""
    micro_batches: int
    """Micro-batches that share a quantised weight, unless a policy says otherwise."""
    measurements: tuple[Measurement, ...]
    refusals: tuple[Refusal, ...] = ()

    def __post_init__(self) -> None:
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches is {self.micro_batches}, 1 or more are needed.")
        try:
            zone = datetime.fromisoformat(self.date).tzinfo
        except ValueError:
            zone = None
        if zone is None:
            raise ValueError(
                f"date is {self.date!r}, ISO 8601 with a time zone is needed, as 2026-11-29T10:00:00+00:00."
            )
        seen: set[GemmShape] = set()
        for shape in (one.shape for one in (*self.measurements, *self.refusals)):
            if shape in seen:
                raise ValueError(f"{shape.line()} stands there twice, one measurement or refusal of a shape is needed.")
            seen.add(shape)

    @property
    def moment(self) -> datetime:
        """The date as a number of sorts."""
        return datetime.fromisoformat(self.date)

    def source(self) -> str:
        """Where the times come from, in words."""
        return f"{self.date[:10]}, {self.engine}, torch {self.torch}, triton {self.triton}"

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        """The report that `save` wrote; a `ValueError` names the file and the field that is wrong."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as problem:  # of bytes that are no text, too
            raise ValueError(f"{path}: not JSON ({problem}); a file that Report.save wrote is needed.") from problem
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise ValueError(f'{path}: no \'"format": "{_FORMAT}"\'; a file that Report.save wrote is needed.')
        try:
            return _read(cls, data, "report")
        except ValueError as problem:
            raise ValueError(f"{path}: {problem} Measure again, or mend the file.") from problem


def _read(kind: Any, value: Any, where: str) -> Any:
    """value as an object of the annotated kind: dataclasses, tuples of one kind, str, bool, int and float."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        return _object(kind, value, where)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_read(get_args(kind)[0], one, f"{where}[{number}]") for number, one in enumerate(value))
    if get_origin(kind) is Literal:
        return value  # the dataclass tells what is allowed
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise ValueError(f"{where} is {json.dumps(value)[:40]}, {_name(kind)} is needed.")


def _object(kind: type, data: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    for name in data:
        if name not in hints:
            raise ValueError(f"{where}.{name} is not known, {', '.join(hints)} are.")
    for field in dataclasses.fields(kind):
        if field.name not in data and field.default is dataclasses.MISSING:
            raise ValueError(f"{where}.{field.name} is missing, {_name(hints[field.name])} is needed.")
    values = {name: _read(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from problem


def _name(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "a list"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return (
        "an object" if dataclasses.is_dataclass(kind) else {str: "a text", bool: "true or false"}.get(kind, "a number")
    )
