"""Whether a product is faster in FP8, from what was measured: arithmetic over reports, no device needed."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from loongforge.kernels.fp8.report import Report
from loongforge.kernels.fp8.shape import GemmShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """BF16 or FP8 for a shape, and why."""

    use_fp8: bool
    speedup: float | None
    """BF16's time over FP8's, None where it is not known."""
    source: str
    """The measurements that say so, or why there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The newest measurement of a shape on a device, or its refusal."""

    m: int
    speedup: float | None
    """None for a refusal."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """FP8 wins for M from `first` to `last`, both included; `speedup` is the largest in between."""

    first: int
    last: int
    speedup: float


@dataclass(frozen=True, slots=True)
class Curve:
    """Speed-up along M, of points in ascending order: logarithms of time are straight lines of log M in between."""

    points: tuple[Point, ...]

    def around(self, m: int) -> tuple[Point, ...]:
        """The point at m, or those on both sides; none outside of what was measured."""
        at = bisect_left(self.points, m, key=lambda point: point.m)
        if at == len(self.points) or (at == 0 and self.points[0].m != m):
            return ()
        return (self.points[at],) if self.points[at].m == m else self.points[at - 1 : at + 1]

    def speedup(self, m: int) -> float | None:
        """At m; None outside of what was measured, and beside a refusal."""
        found = self.around(m)
        values = [point.speedup for point in found if point.speedup is not None]
        if not found or len(values) < len(found):
            return None
        if len(values) == 1:
            return values[0]
        share = math.log(m / found[0].m) / math.log(found[1].m / found[0].m)
        return values[0] * (values[1] / values[0]) ** share  # between equal ends their very value: a tie stays one

    def wins(self, margin: float) -> tuple[Interval, ...]:
        """Where the speed-up is at least margin, exactly as `speedup` says for every M."""
        parts = [(point.m, point.m) for point in self.points if (point.speedup or 0) >= margin]
        parts += [part for one, other in pairwise(self.points) if (part := self._part(one, other, margin))]
        merged: list[tuple[int, int]] = []
        for first, last in sorted(parts):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
            else:
                merged.append((first, last))
        return tuple(Interval(first=a, last=b, speedup=self._largest(a, b)) for a, b in merged)

    def _part(self, one: Point, other: Point, margin: float) -> tuple[int, int] | None:
        """The M between two points where FP8 wins: all, none, or up to the only crossing of a monotone line."""
        if one.speedup is None or other.speedup is None or max(one.speedup, other.speedup) < margin:
            return None
        inside = range(one.m + 1, other.m)
        rising = other.speedup >= one.speedup
        at = bisect_left(inside, True, key=lambda m: ((self.speedup(m) or 0) >= margin) == rising)
        part = inside[at:] if rising else inside[:at]
        return (part[0], part[-1]) if part else None

    def _largest(self, first: int, last: int) -> float:
        """Lines have their largest value at an end."""
        inside = [point.m for point in self.points if first <= point.m <= last]
        return max(self.speedup(m) or 0 for m in (first, last, *inside))


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What reports say together; `merge` and `load` make one."""

    curves: Mapping[str, Mapping[GemmShape, Curve]]
    """By name of the device, then by shape with an m of 1."""
    emulated: frozenset[str]
    """Devices of reports that decide nothing."""
    margin: float

    @classmethod
    def merge(cls, *reports: Report, margin: float = 1.03, micro_batches: int | None = None) -> Policy:
        """From reports in any order: of two on a shape and device the newer one counts, of two of one date the later.

        FP8 has to be `margin` times as fast; `micro_batches` replaces the reports' own number. Raises ValueError for a
        margin below 1 or micro_batches below 1.
        """
        if not 1 <= margin < math.inf:
            raise ValueError(f"Policy: margin is {margin}, 1 or more is needed.")
        if micro_batches is not None and micro_batches < 1:
            raise ValueError(f"Policy: micro_batches is {micro_batches}, 1 or more are needed.")
        found: dict[str, dict[GemmShape, dict[int, Point]]] = {}
        for report in sorted(reports, key=lambda report: report.moment):
            if report.emulated:
                continue
            device = found.setdefault(report.device, {})
            for shape, point in _points(report, micro_batches or report.micro_batches):
                device.setdefault(shape, {})[point.m] = point
        curves = {
            device: {shape: Curve(tuple(points[m] for m in sorted(points))) for shape, points in shapes.items()}
            for device, shapes in found.items()
        }
        emulated = frozenset(report.device for report in reports if report.emulated)
        return cls(curves=curves, emulated=emulated, margin=margin)

    @classmethod
    def load(cls, *paths: Path, margin: float = 1.03, micro_batches: int | None = None) -> Policy:
        """`merge` of the reports in files."""
        return cls.merge(*(Report.load(path) for path in paths), margin=margin, micro_batches=micro_batches)

    def decide(self, shape: GemmShape, device: str) -> Decision:
        """For a shape on a device of this name; BF16 wherever nothing was measured."""
        curve = self.curves.get(device, {}).get(_line(shape))
        if curve is None:
            return Decision(use_fp8=False, speedup=None, source=self._unknown(shape, device))
        near, speedup = curve.around(shape.m), curve.speedup(shape.m)
        if not near:
            first, last = curve.points[0].m, curve.points[-1].m
            return Decision(
                use_fp8=False, speedup=None, source=f"M {shape.m} is outside of {first} to {last}, measured"
            )
        if speedup is None:
            refused = next(point for point in near if point.speedup is None)
            return Decision(use_fp8=False, speedup=None, source=f"M {refused.m} was refused: {refused.source}")
        where = "at M" if len(near) == 1 else "between M"
        source = f"{where} {' and '.join(str(point.m) for point in near)}, measured {'; '.join(_sources(near))}"
        return Decision(use_fp8=speedup >= self.margin, speedup=speedup, source=source)

    def explain(self) -> str:
        """For every line of shapes where FP8 is used, as a table."""
        rows = [("device", "recipe", "op", "N", "K", "groups", "FP8 is used")]
        for device, shapes in sorted(self.curves.items()):
            for shape, curve in sorted(shapes.items(), key=lambda item: dataclasses.astuple(item[0])):
                sizes = (str(shape.n), str(shape.k), str(shape.groups))
                rows.append((device, shape.recipe, shape.op, *sizes, self._words(curve)))
        rows += [(device, *"-----", "never: emulated") for device in sorted(self.emulated - set(self.curves))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def _words(self, curve: Curve) -> str:
        parts = [
            f"from M {one.first} to {one.last} (up to {one.speedup:.2f}x)" if one.first < one.last
            else f"at M {one.first} ({one.speedup:.2f}x)" for one in curve.wins(self.margin)
        ]  # fmt: skip
        measured = f"measured {curve.points[0].m} to {curve.points[-1].m}, {'; '.join(_sources(curve.points))}"
        return f"{', '.join(parts) or 'never'}; {measured}"

    def _unknown(self, shape: GemmShape, device: str) -> str:
        if device in self.emulated and device not in self.curves:
            return f"times on {device} are emulated and decide nothing"
        if device not in self.curves:
            return f"nothing was measured on {device}, only on {', '.join(sorted(self.curves)) or 'no device'}"
        shapes = list(self.curves[device])
        for name in ("recipe", "op", "n", "k", "groups"):
            wanted = getattr(shape, name)
            known = sorted({getattr(one, name) for one in shapes})
            shapes = [one for one in shapes if getattr(one, name) == wanted]
            if not shapes:
                return f"{name} {wanted} was not measured on {device}, only {', '.join(str(one) for one in known)}"
        raise AssertionError(f"{shape.line()} was measured on {device}")


def _line(shape: GemmShape) -> GemmShape:
    return dataclasses.replace(shape, m=1)


def _points(report: Report, micro_batches: int) -> list[tuple[GemmShape, Point]]:
    """Of a report, each with the line of shapes that it belongs to."""
    found = [
        (one.shape, Point(m=one.shape.m, speedup=one.speedup(micro_batches), source=report.source()))
        for one in report.measurements
    ]
    found += [(one.shape, Point(m=one.shape.m, speedup=None, source=one.reason)) for one in report.refusals]
    return [(_line(shape), point) for shape, point in found]


def _sources(points: tuple[Point, ...]) -> list[str]:
    return list(dict.fromkeys(point.source for point in points if point.speedup is not None))
