"""The text of `loongforge plan`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from loongforge.core.plan import Report

GIB = 2**30
WIDTH = 120
"""Characters of a line. On a narrower screen it wraps: a table that is cropped would hide numbers."""


def show_table(found: Report, device_gib: float | None) -> None:
    """Print a report; `device_gib` stands beside the peak when given."""
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    table = _table("GiB per rank", "axes", "weights", "grads", "optim", "activ", "total")
    for part in found.components:
        peak = part.peak
        axes = [f"{name}{size}" for name, size in part.axes.items() if size > 1] + ["sp"] * part.sequence_parallel
        if part.mode:
            axes.insert(0, part.mode)
        sizes = (peak.weights, peak.gradients, peak.optimizer, peak.activations, peak.total)
        table.add_row(part.name, " ".join(axes) or "one rank", *(f"{size / GIB:.3f}" for size in sizes))
    console.print(table)
    console.print("\n".join(_lines(found, device_gib)), soft_wrap=True)
    if found.modes:
        console.print(_modes(found))
        console.print("\n".join(_advice(found)), soft_wrap=True)


def _lines(found: Report, device_gib: float | None) -> Iterator[str]:
    for part in found.components:
        yield (
            f"parameters {part.parameters:,} ({part.name}, {part.family}), "
            f"at most {max(part.parameters_per_rank):,} on one rank"
        )
    fits = f" of {device_gib:g}" if device_gib else ""
    yield f"peak       {found.peak_bytes / GIB:.2f}{fits} GiB on the fullest rank (estimate)"
    yield (
        f"batch      {found.global_batch_size} x {found.seq_length} = {found.tokens_per_step:,} tokens per step, "
        f"{found.num_microbatches} x {found.micro_batch_size} sequence(s) per rank"
    )
    yield f"run        {found.train_iters:,} steps, {found.tokens:,} tokens, {found.world} rank(s)"
    per_step = found.flops_per_step / 1e12
    yield (
        f"arithmetic {found.flops_per_token / 1e9:.3f} GFLOP per token, {per_step:.3f} TFLOP per step, "
        f"{per_step / found.world:.3f} per rank"
    )
    if found.encoder_flops_per_step:
        yield f"images     {found.encoder_flops_per_step / 1e12:.3f} TFLOP per step, if there are {found.images}"
    yield f"pipeline   bubble {found.pipeline_bubble:.1%} of the working time"
    sent = asdict(found.traffic)
    axes = ", ".join(f"{name} {value / GIB:.3f}" for name, value in sent.items() if value)
    total = f"{found.traffic.total / GIB:.3f} GiB per rank and step"
    yield from _folded("sent", f"{total}: {axes}" if axes else total)
    yield from (f"note       {note}" for note in found.notes)


def _table(*names: str) -> Table:
    """Two columns of words, the rest of numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for at, name in enumerate(names):
        table.add_column(name, justify="left" if at < 2 else "right", no_wrap=True)
    return table


def _modes(found: Report) -> Table:
    """The encoder in each of its places."""
    table = _table("encoder", "where", "ranks", "step", "lost", "GiB", "")
    shortest = min((mode.step_flops for mode in found.modes if mode.refused is None), default=0)
    for mode in found.modes:
        numbers = ("-", "-", "-")
        if mode.refused is None:
            numbers = (f"{mode.step_flops / shortest:.2f}x", f"{mode.idle:.1%}", f"{mode.peak_bytes / GIB:.2f}")
        mark = "<- this run" if mode.configured else ""
        table.add_row(mode.name, mode.layout, str(mode.ranks), *numbers, mark)
    return table


def _advice(found: Report) -> Iterator[str]:
    for mode in found.modes:
        if mode.refused is not None:
            yield from _folded("refused", f"{mode.name}: {mode.refused}")
    if found.advice is not None:
        yield from _folded("advice", f"{found.advice.mode}: {found.advice.why}")
    yield from _folded("assumed", f"{found.images}; lost: the share of a step that ranks wait for the encoder.")


def _folded(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{label:<11}", subsequent_indent=" " * 11, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
