"""What one step reports, and `metrics.jsonl`: one object per step, each step once, whatever the run went through."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from loongforge.core.errors import CheckpointError

FILE = "metrics.jsonl"
"""Name of the file in the run's directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step of the whole job."""

    step: int
    """Optimizer steps done, this one included: the first step reports 1."""
    loss: float
    """Mean over the unmasked tokens of the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate of this step."""
    tokens: int
    """Positions of the global batch, padding included."""
    loss_tokens: int
    """Tokens of the global batch whose prediction counts."""
    consumed_samples: int
    """Samples consumed since the beginning of the run, this step included."""
    seconds: float
    """Wall time of the step, the wait for data included."""
    data_wait_seconds: float
    """Part of `seconds` that the step waited for data."""
    tokens_per_second: float
    """`tokens` by `seconds`."""
    peak_memory_bytes: int
    """Most memory this process held on its device so far."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """More numbers by name, for example the held-out loss."""
    detail: Mapping[str, float] = field(default_factory=dict)
    """Numbers that are recorded and not shown on the terminal, `expert_load/max/layer_3`."""

    def values(self) -> dict[str, Any]:
        """All numbers by name, `extra` and `detail` beside the others."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("extra", "detail")}
        clash = own.keys() & self.extra.keys()
        assert not clash, f"extra repeats {sorted(clash)}"
        return own | dict(self.extra) | dict(self.detail)


class MetricsFile:
    """Appends to `metrics.jsonl`; opening it cuts what a run wrote after the step it resumes from.

    Numbers have all their digits, and null stands for one that is not finite. Each line reaches the operating system
    at once. Raises `CheckpointError` when the directory cannot be written.
    """

    def __init__(self, directory: Path, start_step: int) -> None:
        self.path = directory / FILE
        self.cut = 0
        """Lines that were removed on opening: later steps, and a last line that a crash tore."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.cut = _cut(self.path, start_step)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}. Give a writable --save.") from error

    def write(self, report: StepReport) -> None:
        """Append one line."""
        line = json.dumps({name: _finite(value) for name, value in report.values().items()}, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}. Free space and resume.") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics file in order, without a torn last line; `CheckpointError` for any other bad line."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"])})
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # no newline after it: the process died while it wrote
                break
            raise CheckpointError(
                f"{path}:{number} is not an object with a step: {line[:60]!r}. Move the file away to go on."
            ) from error
    return rows


def _cut(path: Path, start_step: int) -> int:
    if not path.exists():
        return 0
    before = path.read_text(encoding="utf-8", errors="replace")
    kept = [row for row in read_metrics(path) if row["step"] <= start_step]
    after = "".join(json.dumps(row) + "\n" for row in kept)
    lines = len([line for line in before.split("\n") if line])
    if after != before:
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_text(after, encoding="utf-8")
        os.replace(fresh, path)  # whole or not at all
    return lines - len(kept)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
