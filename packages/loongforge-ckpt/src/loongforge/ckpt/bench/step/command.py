"""`loongforge bench step`: one training step of ours against what one would use instead."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loongforge.ckpt.bench.step.case import LEARNING_RATE, WEIGHT_DECAY, Case, Result
from loongforge.ckpt.bench.step.devices import Peak, peak_of
from loongforge.ckpt.bench.step.gate import differences
from loongforge.ckpt.bench.step.planned import as_json, calibration_of, keep, planned_lines
from loongforge.ckpt.bench.step.report import Row, flops_of, kernel_lines, lines, rows_of
from loongforge.ckpt.bench.step.worker import SIDES
from loongforge.core.errors import ConfigError

if TYPE_CHECKING:
    from loongforge.ckpt.bench.step.turns import Side
    from loongforge.core.config.run import RunConfig

ABOUT = """\
Train one model from the same random weights on the same tokens: with our layers, with ours on TransformerEngine, with
transformers (fused attention, Liger's kernels and fused AdamW where they are installed), and with megatron-core's own
layers. Losses of the first steps and the first gradient's norm are compared before anything is timed; where they
differ, the exit code is 1. Then time of a step, tokens per second, MFU, memory, and how much quicker ours is.
"""
EXAMPLES = """\
Every flag of `loongforge train` that describes the model and the step may follow: --num-layers 4 makes a model less
deep, --recompute-granularity full recomputes on every side. Several models, lengths or documents make several cases.

examples:
  loongforge bench step --model-name qwen3-0.6b --seq-length 4096 32768 --documents 1 8 --json step.json
  loongforge bench step --model-name qwen3-30b-a3b --num-layers 6 --sides ours megatron --profile
"""


def command(argv: list[str]) -> int:
    """Measure and report; 1 when sides differ or one failed."""
    options, cases = _parser().parse_known_args(argv)[0], cases_of(argv)
    from loongforge.ckpt.bench.step.turns import rounds, sides_of

    report: dict[str, Any] = {"command": ["loongforge", "bench", "step", *argv], "cases": []}
    problems: list[str] = []
    sound: list[tuple[Case, list[Row]]] = []
    with sides_of(options.sides, options.threads) as sides:
        peak = _peak(sides, options, cases[0])
        report |= _head(sides, peak)
        print(_head_line(report), flush=True)
        for case in cases:
            results = rounds(case, sides, options.rounds, _tell)
            wrong = differences(results, case.config.train.precision)
            wrong += [f"{one.side}: {one.reason}" for found in results.values() for one in found if one.failed]
            problems += [f"{case.label}: {sentence}" for sentence in wrong]
            rows = rows_of(case, results, peak)
            sound += [] if any(sentence.startswith("ours") for sentence in wrong) else [(case, rows)]
            report["cases"].append(_written(case, results, peak, wrong))
            print("\n".join(["", *lines(case, rows), *kernel_lines(results)]), flush=True)
            _write(report, sound, options)  # after every case: what ends a run takes nothing that was measured
    if found := calibration_of(report["device"], report["date"], sound):
        print("\n".join(["", *planned_lines(found)]))
    for problem in problems:
        print(f"bench step: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _write(
    report: dict[str, Any], sound: Sequence[tuple[Case, Sequence[Row]]], options: argparse.Namespace
) -> None:  # fmt: skip
    """The files that were asked for; times of sides that differ calibrate nothing."""
    found = calibration_of(report["device"], report["date"], sound)
    report["plan"] = as_json(found) if found else []
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.calibrate and found:
        keep(found, options.calibrate)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loongforge bench step", description=ABOUT, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model-name", nargs="+", required=True, help="as `loongforge list models` has them")
    parser.add_argument("--seq-length", type=_count, nargs="+", default=[4096], help="tokens of a row (4096)")
    parser.add_argument("--documents", type=_count, nargs="+", default=[1], help="packed into a row (1: not packed)")
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES), help="all, when not given")
    parser.add_argument("--steps", type=_count, default=10, help="of a timed stretch; two in each round (10)")
    parser.add_argument("--gate-steps", type=_count, default=8, help="whose losses are compared; they warm up (8)")
    parser.add_argument("--rounds", type=_count, default=2, help="turns of every side (2)")
    parser.add_argument("--profile", action="store_true", help="show the kernels and launches of a step of each side")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="of the device; else a datasheet or a product")
    parser.add_argument("--threads", type=_count, help="of a CPU")
    parser.add_argument(
        "--disturb", choices=tuple(SIDES), help="change one weight of a side: the comparison must see it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="write, or add, for `loongforge plan --calibration FILE`"
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def cases_of(argv: Sequence[str]) -> list[Case]:
    """Everything that the command line asks for; `ConfigError` or `PlanError` for what cannot be measured."""
    options, rest = _parser().parse_known_args(argv)
    return list(_cases(options, rest))


def _cases(options: argparse.Namespace, rest: Sequence[str]) -> Iterator[Case]:
    from loongforge.core.config.resolve import resolve
    from loongforge.core.plan import Plan

    for model, length, documents in product(options.model_name, options.seq_length, options.documents):
        fixed = ["--model-name", model, "--seq-length", str(length), "--train-iters", "1000000"]
        rate = ["--lr", str(LEARNING_RATE), "--min-lr", str(LEARNING_RATE), "--weight-decay", str(WEIGHT_DECAY)]
        config = resolve([*fixed, *rate, *rest], note=lambda _: None)
        train, label = config.train, _label(model, config, documents)
        problems: list[str] = []
        if train.global_batch_size not in (None, train.micro_batch_size):
            problems.append("bench step: a step is one micro-batch on one device; leave out --global-batch-size.")
        if documents > 1 and (train.micro_batch_size > 1 or documents > length // 2):
            problems.append(f"bench step: --documents {documents} are packed into one row, --micro-batch-size 1.")
        if config.model.image_encoder is not None:
            problems.append("bench step: language models alone are measured, without an encoder.")
        if problems:
            raise ConfigError(*problems)
        Plan.of(config, 1)  # refuses what cannot run
        yield Case(
            label=label, config=config, documents=documents, gate_steps=options.gate_steps, steps=options.steps,
            profile=options.profile, disturbed=options.disturb,
        )  # fmt: skip


def _label(model: str, config: RunConfig, documents: int) -> str:
    """A name that tells cases apart."""
    words = [model, f"x{config.model.foundation.geometry.num_layers}", str(config.train.seq_length)]
    words += [f"/{documents}"] if documents > 1 else []
    words += ["recomputed"] if config.parallel.recompute_granularity else []
    return " ".join(words)


def _peak(sides: Mapping[str, Side], options: argparse.Namespace, case: Case) -> Peak:
    side = next((side for side in sides.values() if not side.ready().missing), None)
    if side is None:
        raise ConfigError("bench step: " + "; ".join(f"{one.name}: {one.ready().missing}" for one in sides.values()))
    device, precision = side.ready().device, case.config.train.precision
    return peak_of(device, options.peak_tflops, side.product(512 if device == "cpu" else 8192, precision), precision)


def _head(sides: Mapping[str, Side], peak: Peak) -> dict[str, Any]:
    facts = next(side.ready() for side in sides.values() if not side.ready().missing)
    return {
        "device": facts.device, "date": datetime.now(UTC).date().isoformat(), "versions": dict(facts.versions),
        "peak": asdict(peak),
    }  # fmt: skip


def _head_line(report: Mapping[str, Any]) -> str:
    peak = report["peak"]
    here = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version != "-")
    return (
        f"{report['device']}, {report['date']}, {here}; MFU of {peak['tflops']:.4g} TFLOP/s ({peak['origin']}), "
        f"a large matrix product reaches {peak['product']:.4g}"
    )


def _written(case: Case, results: Mapping[str, Sequence[Result]], peak: Peak, wrong: Sequence[str]) -> dict[str, Any]:
    """A case as it stands in the file."""
    train = case.config.train
    return {
        "case": case.label,
        "micro_batch_size": train.micro_batch_size, "seq_length": train.seq_length, "documents": case.documents,
        "precision": train.precision, "recompute": case.config.parallel.recompute_granularity,
        "tflop_per_step": flops_of(case) / 1e12,
        "equal": not wrong, "problems": list(wrong),
        "rows": [asdict(row) for row in rows_of(case, results, peak)],
        "rounds": [asdict(result) for found in results.values() for result in found],
    }  # fmt: skip


def _tell(result: Result) -> None:
    """A sign of life."""
    what = result.reason or f"{1e3 * min(result.seconds):.1f} ms a step"
    print(f"  {result.case}: {result.side}: {what}", file=sys.stderr, flush=True)
