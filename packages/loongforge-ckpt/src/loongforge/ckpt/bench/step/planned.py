"""What the plan says of the cases, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loongforge.ckpt.bench.step.case import Case
from loongforge.ckpt.bench.step.report import GIB, Row
from loongforge.core.plan import Plan
from loongforge.core.plan.calibration import Calibration, Measured, Work


def calibration_of(
    device: str, date: str, cases: Sequence[tuple[Case, Sequence[Row]]]
) -> Calibration | None:  # fmt: skip
    """Our side as the trainer runs here, with TransformerEngine where that was measured; None when neither was."""
    found: dict[str, list[Measured]] = {"ours-te": [], "ours": []}
    for case, rows in cases:
        for row in rows:
            if row.side in found and row.seconds is not None:
                work = Work.of(Plan.of(case.config, 1), case.boundaries)
                found[row.side].append(
                    Measured(case=case.label, work=work, seconds=row.seconds, peak_bytes=row.peak_bytes)
                )
    side = next((name for name, measured in found.items() if measured), None)
    if side is None:
        return None
    precision = cases[0][0].config.train.precision
    return Calibration(device=device, date=date, precision=precision, side=side, cases=tuple(found[side]))


def keep(found: Calibration, path: Path) -> None:
    """Write the file. Cases that another command has put there stay, if device, precision and layers are the same."""
    cases = list(found.cases)
    if path.exists():
        before = Calibration.load(path)
        if (before.device, before.precision, before.side) == (found.device, found.precision, found.side):
            now = {case.case for case in found.cases}
            cases = [*(case for case in before.cases if case.case not in now), *cases]
    replace(found, cases=tuple(cases)).save(path)


def planned_lines(found: Calibration) -> Iterator[str]:
    """Memory as planned and a time told by the other cases, each with its error."""
    yield f"plan against {found.side}:"
    for case in found.cases:
        words = [f"planned {case.work.planned_bytes / GIB:.2f} GiB"]
        if case.peak_bytes is not None:
            words[0] += f" ({case.work.planned_bytes / case.peak_bytes - 1:+.1%})"
        if len(found.cases) > 1:
            seconds, peak = found.without(case).raw(case.work)
            words.append(f"the other cases tell {1e3 * seconds:.1f} ms ({seconds / case.seconds - 1:+.1%})")
            if peak is not None and case.peak_bytes is not None:
                words.append(f"{peak / GIB:.2f} GiB ({peak / case.peak_bytes - 1:+.1%})")
        yield f"  {case.case}: {', '.join(words)}"


def as_json(found: Calibration) -> list[Mapping[str, float | str | None]]:
    """The same for a file."""
    rows: list[Mapping[str, float | str | None]] = []
    for case in found.cases:
        seconds, peak = found.without(case).raw(case.work) if len(found.cases) > 1 else (None, None)
        rows.append(
            {
                "case": case.case, "side": found.side, "planned_bytes": case.work.planned_bytes,
                "peak_bytes": case.peak_bytes, "told_bytes": peak, "seconds": case.seconds, "told_seconds": seconds,
            }
        )  # fmt: skip
    return rows
