"""What a run says in words: its choices at the start, how to go on at an early end."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from loongforge.core.config.run import RunConfig
from loongforge.core.model.trainable import table
from loongforge.core.plan import Plan
from loongforge.core.plan.index import route_line
from loongforge.core.watch.watch import Watch

if TYPE_CHECKING:
    from loongforge.core.data.open import Data
    from loongforge.core.model.build import Model
    from loongforge.core.platform import Choice


def kernel_lines(plan: Plan, model: Model) -> list[str]:
    """A line for every choice and its reasons, with the ops that it was made for."""
    lines = list(model.layers.ops)
    if plan.geometry.experts is not None and model.layers.groups_experts(plan.config.moe):
        lines.append(model.layers.grouped().line)
    if plan.geometry.delta is not None:
        lines += model.layers.delta().lines
    ops: dict[str, list[str]] = {}
    for op, _, choice in (line.partition(": ") for line in lines):
        ops.setdefault(choice, []).append(op)
    return [f"Kernel {', '.join(named)}: {choice}." for choice, named in ops.items()]


def announce(watch: Watch, plan: Plan, choice: Choice, model: Model, data: Data, notes: list[str]) -> None:
    """Say once what was chosen and why."""
    encoder = f", encoder {plan.encoder}" if plan.encoder else ""
    watch.note(f"Platform {choice.name} ({choice.reason}), layout: {plan.layout}{encoder}.")
    watch.note(f"Layers: {model.layers.name} ({model.layers.reason}).")
    for line in kernel_lines(plan, model):
        watch.note(line)
    if (line := route_line(plan)) is not None:
        watch.note(f"Kernel {line}")
    for line in table(model.parts):
        watch.note(line)
    if report := data.train.report():
        watch.note("Data: " + ", ".join(f"{name} {value}" for name, value in report.items()) + ".")
    if len(data.quarantine):
        watch.note(str(data.quarantine))
    for note in notes:
        watch.note(note)


def farewell(config: RunConfig, step: int) -> str:
    """How to go on after an early stop."""
    save = config.checkpoint.save
    if not save:
        return f"Stopped after step {step}; nothing was saved because no --save was given."
    done = f"after step {step}" if step else "before the first step; nothing to save"
    return f"Stopped {done}. Go on with: loongforge train --config-file {shlex.quote(f'{save}/config.yaml')}"
