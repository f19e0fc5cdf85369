"""The table of a case."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from loongforge.ckpt.bench.step.case import Case, Result
from loongforge.ckpt.bench.step.devices import Peak
from loongforge.ckpt.bench.step.gate import distance, reference_of

GIB = 2**30
SHOWN_KERNELS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One side of one case, all rounds together."""

    side: str
    about: str
    seconds: float | None = None
    """Median over the timed stretches; None when nothing was measured."""
    spread: float = 0.0
    """Slowest stretch relative to the quickest, less one."""
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    """Model FLOPs over time and the peak of the device."""
    peak_bytes: int | None = None
    ratio: float | None = None
    """Its time over that of the quickest of ours."""
    loss_difference: float = 0.0
    norm_difference: float = 0.0
    reason: str = ""


def flops_of(case: Case) -> int:
    """Model FLOPs of a step, every document by itself."""
    from loongforge.core.plan import Plan
    from loongforge.core.plan.compute import flops_per_token

    plan, rows = Plan.of(case.config, 1), case.config.train.micro_batch_size
    return rows * sum((end - start) * flops_per_token(plan, end - start) for start, end in pairwise(case.boundaries))


def rows_of(case: Case, results: Mapping[str, Sequence[Result]], peak: Peak) -> list[Row]:
    """What the rounds say, in the order of the sides."""
    times = {name: [one for result in found for one in result.seconds] for name, found in results.items()}
    medians = {name: statistics.median(found) for name, found in times.items() if found}
    ours = min((medians[name] for name in medians if name.startswith("ours")), default=None)
    reference, flops = reference_of(results), flops_of(case)
    other = None if reference is None else next(one for one in results[reference] if one.losses)
    rows: list[Row] = []
    for name, found in results.items():
        last = found[-1]
        if name not in medians:
            rows.append(Row(side=name, about=last.about, reason=last.reason))
            continue
        assert other is not None, "a side that was timed has losses"
        apart = [distance(one, other) for one in found if one.losses]
        seconds, peaks = medians[name], [one.peak_bytes for one in found if one.peak_bytes]
        rows.append(
            Row(
                side=name, about=found[0].about, seconds=seconds, spread=max(times[name]) / min(times[name]) - 1,
                tokens_per_second=case.tokens / seconds, mfu=flops / seconds / (1e12 * peak.tflops),
                peak_bytes=max(peaks, default=None), ratio=None if ours is None else seconds / ours,
                loss_difference=max(loss for loss, _ in apart), norm_difference=max(norm for _, norm in apart),
                reason=last.reason,
            )
        )  # fmt: skip
    return rows


def lines(case: Case, rows: Sequence[Row]) -> Iterator[str]:
    """For a terminal."""
    packed = f", {case.documents} documents" if case.documents > 1 else ""
    yield (
        f"{case.label}: {case.config.train.micro_batch_size} x {case.config.train.seq_length} tokens{packed}, "
        f"{case.config.train.precision}, {flops_of(case) / 1e12:.3f} TFLOP per step"
    )
    yield (
        f"{'side':21} {'step ms':>9} {'spread':>6} {'tokens/s':>9} {'MFU':>6} {'peak GiB':>8} {'ours is':>8}"
        f"  {'loss':>7} {'norm':>7}"
    )
    for row in rows:
        if row.seconds is None:
            yield f"{row.side:21} not measured: {row.reason}"
            continue
        memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / GIB:.2f}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
        yield (
            f"{row.side:21} {1e3 * row.seconds:9.1f} {row.spread:6.1%} {row.tokens_per_second:9.0f} {row.mfu:6.1%} "
            f"{memory:>8} {ratio:>8}  {row.loss_difference:7.0e} {row.norm_difference:7.0e}"
            + (f"  then: {row.reason}" if row.reason else "")
        )
    yield from (f"{row.side:21} {row.about}" for row in rows if row.about)


def kernel_lines(results: Mapping[str, Sequence[Result]]) -> Iterator[str]:
    """Where a step's time goes, by side."""
    for name, found in results.items():
        profiled = next((one.profiled for one in found if one.profiled is not None), None)
        if profiled is None:
            continue
        whole = sum(one.milliseconds for one in profiled.kernels)
        launched = f", {profiled.launches:.0f} launches" if profiled.launches else ""
        yield f"{name}: {whole:.2f} ms in {len(profiled.kernels)} kernels a step{launched}"
        for kernel in profiled.kernels[:SHOWN_KERNELS]:
            share = kernel.milliseconds / whole
            yield f"  {kernel.milliseconds:9.3f} ms {share:6.1%} {kernel.calls:7.0f} x  {kernel.name[:90]}"
