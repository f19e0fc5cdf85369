"""A training step of a vision-language model with its encoder in each of its places, against the homogeneous layout.

    uv run python bench/encoder_modes.py                          # 4 processes: tp2-pp2, tp4, pp4
    uv run python bench/encoder_modes.py --layout tp2-pp4 --steps 5 --json

Images have log-normal areas; some sequences have none, some are one large image (`image_mix.py`). Before any number is
printed the first step's loss and gradient norm of all modes and layouts are compared; a difference ends the benchmark
with exit code 1.

`step` is how long a step takes when every rank has a core and exchanges are free: each rank's CPU time between two
exchanges is measured and replayed on clocks that wait for each other (`step_clock.py`). `idle` is the share of it in
which a rank, on average, waits; `imbalance` is 1 - mean / max of the ranks' CPU time, which no schedule can avoid;
`lost` is the share that ranks lose to the encoder, the pipeline's own bubble not counted: 1 - (a step of text alone +
the cheapest mode's encoder work spread evenly) / step. `forecast` is what `loongforge plan` says of `lost`, and
`forecast, free exchange` the same with exchanges that take no time, as in the replay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections import defaultdict
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

from image_mix import SIZES, make_model
from step_clock import Recorder, Replayed, replay

LAYOUTS = {
    # name: tensor parallel, pipeline stages, replicas
    "tp2": (2, 1, 1),
    "tp2-pp2": (2, 2, 1),
    "tp4": (4, 1, 1),
    "pp4": (1, 4, 1),
    "tp2-pp4": (2, 4, 1),
    "tp2-pp2-dp2": (2, 2, 2),
}
FOUR = ("tp2-pp2", "tp4", "pp4")
TOLERANCE = 1e-6
"""Largest relative difference of the first step's loss and gradient norm between modes; fp32."""
TEXT = "text alone"
"""A step without images, which shows what the pipeline leaves idle by itself."""


def modes_of(layout: str) -> dict[str, list[str]]:
    """Flags of each mode that the layout has."""
    tp = LAYOUTS[layout][0]
    found: dict[str, list[str]] = {"homogeneous": []}
    for size in (size for size in range(2, tp) if tp % size == 0):
        found[f"(a) encoder tp {size}"] = [f"+model.image_encoder.tensor-model-parallel-size={size}"]
    if tp > 1:
        found["(b) data parallel over tp"] = ["--enable-encoder-hetero-dp"]
    found["(c) ahead"] = ["--enable-full-hetero-dp"]
    found["(c) ahead, offloaded"] = ["--enable-full-hetero-dp", "--full-hetero-dp-cpu-offload"]
    return found


def config_of(directory: Path, size: str, layout: str, mode: str) -> Any:
    """The run of one mode."""
    from loongforge.core.config.resolve import resolve

    tp, pp, _ = LAYOUTS[layout]
    words = (
        f"--load {directory} --fp32 --seq-length {SIZES[size].length} --micro-batch-size 1 --train-iters 1000 "
        f"--global-batch-size {SIZES[size].sequences} --lr 1e-4 --min-lr 1e-4 --use-distributed-optimizer "
        f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}"
    )
    return resolve([*words.split(), *modes_of(layout)[mode]])


def main() -> int:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="28m")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="default: those of 4 processes")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one that warms up")
    parser.add_argument("--rounds", type=int, default=2, help="times all modes run, in turns; the quicker pieces count")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one mode")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    layouts: list[str] = arguments.layout or list(FOUR)
    recorder = start()
    with tempfile.TemporaryDirectory(prefix="loongforge-bench-") as name:
        directory = Path(name) / "model"
        make_model(SIZES[arguments.size], directory)
        seen, exchanges, busy_waiting = measure_all(directory, layouts, arguments, recorder)
        if wrong := differences(seen):
            print("\n".join([*wrong, "The modes do not compute the same: their times mean nothing."]), file=sys.stderr)
            return 1
        report = {
            "machine": machine(arguments.size, arguments.steps, busy_waiting, max(len(r) for r in seen.values())),
            "modes": [row for layout in layouts for row in rows_of(directory, arguments.size, layout, seen)],
            "exchange": [exchange_row(layout, exchanges[layout], seen[layout, "homogeneous"]) for layout in layouts],
        }
    print(json.dumps(report, indent=1) if arguments.json else table(report))
    return 0


def start() -> Recorder:
    """megatron-core in this process, from which the others are forked, with a recorder in front of its exchanges."""
    recorder = Recorder()
    recorder.install()  # before megatron-core keeps functions of torch.distributed for itself
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform import choose

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    start_megatron(choose("cpu").platform())
    import torch

    torch.set_num_threads(1)  # no pool may be running when processes are forked
    return recorder


def measure_all(
    directory: Path, layouts: list[str], arguments: argparse.Namespace, recorder: Recorder
) -> tuple[dict[tuple[str, str], list[Any]], dict[str, list[Any]], float]:
    """What every rank saw by layout and mode, the exchange alone by layout, and what waiting costs."""
    from encoder_workers import measure, measure_exchange, quickest, waiting

    from loongforge.core.testing import run_distributed

    size, steps = arguments.size, arguments.steps
    seen: dict[tuple[str, str], list[Any]] = {}
    rounds: dict[tuple[str, str], list[list[Any]]] = defaultdict(list)
    exchanges: dict[str, list[Any]] = {}
    busy_waiting = max(run_distributed(waiting, 2))
    for layout in layouts:
        tp, pp, dp = LAYOUTS[layout]
        plain = config_of(directory, size, layout, "homogeneous")
        configs = {mode: config_of(directory, size, layout, mode) for mode in modes_of(layout)}
        everything = {**configs, TEXT: plain}
        for mode, config in chain(*[everything.items()] * arguments.rounds):
            body = partial(measure, config=config, size=size, steps=steps, recorder=recorder, images=mode != TEXT)
            rounds[layout, mode].append(run_distributed(body, tp * pp * dp, timeout=arguments.timeout))
        for mode in everything:
            seen[layout, mode] = [quickest(runs) for runs in zip(*rounds[layout, mode], strict=True)]
        alone = partial(measure_exchange, config=plain, size=size, steps=steps, recorder=recorder)
        exchanges[layout] = run_distributed(alone, tp * pp * dp, timeout=arguments.timeout)
    return seen, exchanges, busy_waiting


def differences(seen: dict[tuple[str, str], list[Any]]) -> list[str]:
    """What the first step of a mode has unlike the first mode, on any rank."""
    images = {key: ranks for key, ranks in seen.items() if key[1] != TEXT}
    first = next(iter(images.values()))[0]
    wrong = []
    for (layout, mode), ranks in images.items():
        for what, ours, theirs in (
            (what, getattr(rank, what), getattr(first, what)) for rank in ranks for what in ("loss", "grad_norm")
        ):
            if not abs(ours - theirs) <= TOLERANCE * abs(theirs):
                wrong.append(f"{layout}, {mode}: {what} of the first step is {ours!r}, not {theirs!r}.")
    return sorted(set(wrong))


def machine(size: str, steps: int, busy_waiting: float, ranks: int) -> dict[str, Any]:
    """Where and how this was measured."""
    cores = len(os.sched_getaffinity(0))
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "cores": cores,
        "load": os.getloadavg()[0],
        "processor": platform.machine(),
        "python": platform.python_version(),
        "size": size,
        "steps": steps,
        "busy_waiting": busy_waiting,
        "wall_means_something": cores >= ranks,
    }


def rows_of(directory: Path, size: str, layout: str, seen: dict[tuple[str, str], list[Any]]) -> list[dict[str, Any]]:
    """One row for each mode of a layout; medians over steps, ratios taken step by step."""
    modes = modes_of(layout)
    replays = {
        mode: [replay(logs) for logs in zip(*(rank.logs for rank in seen[layout, mode]), strict=True)]
        for mode in [*modes, TEXT]
    }
    steps = range(len(replays[TEXT]))
    text = [replays[TEXT][step] for step in steps]
    work = [min(sum(replays[mode][step].busy) for mode in modes) - sum(text[step].busy) for step in steps]
    forecasts = {mode: forecast(config_of(directory, size, layout, mode), layout) for mode in modes}
    rows = []
    for mode in modes:
        mine, base = replays[mode], replays["homogeneous"]
        even = [text[step].length + work[step] / len(mine[step].busy) for step in steps]
        lost = [1 - even[step] / mine[step].length for step in steps]
        ratios = [one.length / other.length for one, other in zip(mine, base, strict=True)]
        totals = [sum(one.busy) / sum(other.busy) for one, other in zip(mine, base, strict=True)]
        rows.append(
            {
                "layout": layout,
                "mode": mode,
                "step_ms": 1e3 * statistics.median(one.length for one in mine),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "cpu_ratio": statistics.median(totals),
                "idle": statistics.median(one.idle for one in mine),
                "imbalance": statistics.median(one.imbalance for one in mine),
                "lost": statistics.median(lost),
                "busy_ms": busy_of(mine),
                "forecast": forecasts[mode],
                "forecast_ratio": forecasts[mode]["length_free"] / forecasts["homogeneous"]["length_free"],
                "encoder_share": statistics.median(work[step] / (work[step] + sum(text[step].busy)) for step in steps),
                "text_idle": statistics.median(one.idle for one in text),
                "collectives": statistics.median(collectives_of(seen[layout, mode])),
                **measured_walls(seen[layout, mode]),
                **features_of(seen[layout, mode]),
            }
        )
    return rows


def busy_of(steps: list[Replayed]) -> list[float]:
    """Milliseconds of each rank, median over steps."""
    return [1e3 * statistics.median(times) for times in zip(*(step.busy for step in steps), strict=True)]


def collectives_of(ranks: list[Any]) -> list[int]:
    """Collectives of each step, of the rank that has most."""
    return [
        max(sum(event.kind == "together" for event in log) for log in logs)
        for logs in zip(*(rank.logs for rank in ranks), strict=True)
    ]


def forecast(config: Any, layout: str) -> dict[str, float]:
    """What a plan of this run says: share of a step lost to the encoder, and its length with free exchanges."""
    from loongforge.core.plan import Plan, modes

    tp, pp, dp = LAYOUTS[layout]
    plan = Plan.of(config, tp * pp * dp)
    length, useful = modes.step_time(plan)
    with patch.object(modes, "FLOPS_PER_BYTE", 0.0):
        free, done = modes.step_time(plan)
    return {"lost": 1 - useful / length, "lost_free": 1 - done / free, "length_free": free}


def measured_walls(ranks: list[Any]) -> dict[str, float]:
    """Wall time, the share of it without CPU time, and CPU time that exchanges took in threads of their own."""
    steps = range(len(ranks[0].walls))
    walls = [max(rank.walls[step] for rank in ranks) for step in steps]
    own = [sum(event.seconds for rank in ranks for event in rank.logs[step]) for step in steps]
    every = [sum(rank.cpus[step] for rank in ranks) for step in steps]
    waits = [1 - every[step] / len(ranks) / walls[step] for step in steps]
    return {
        "wall_ms": 1e3 * statistics.median(walls),
        "wall_idle": statistics.median(waits),
        "exchange_cpu": statistics.median(1 - own[step] / every[step] for step in steps),
    }


def features_of(ranks: list[Any]) -> dict[str, float]:
    """KiB of features on the fullest rank, over all steps, and on the one that would gather those of a step."""
    steps = range(len(ranks[0].held))
    return {
        "held_kib": max(max(rank.held) for rank in ranks) / 1024,
        "host_kib": max(max(rank.hosted) for rank in ranks) / 1024,
        "peak_kib": max(max(rank.peak) for rank in ranks) / 1024,
        "gathered_kib": max(sum(rank.received[step] for rank in ranks) for step in steps) / 1024,
        "feature_share": statistics.mean(ranks[0].feature_share),
        "images": statistics.mean(ranks[0].images),
    }


def exchange_row(layout: str, found: list[Any], ranks: list[Any]) -> dict[str, Any]:
    """What the exchange of features costs a rank of the first stage, beside its whole step."""
    first = [(cost, rank) for cost, rank in zip(found, ranks, strict=True) if cost is not None]
    cpu = [statistics.median(rank.cpus) for _, rank in first]
    return {
        "layout": layout,
        "routed_ms": 1e3 * max(cost.routed for cost, _ in first),
        "short_ms": 1e3 * max(cost.short for cost, _ in first),
        "share": max((cost.routed - cost.short) / mine for (cost, _), mine in zip(first, cpu, strict=True)),
        "collectives": max(cost.collectives for cost, _ in first),
        "of_collectives": statistics.median(collectives_of(ranks)),
        "difference": max(cost.difference for cost, _ in first),
    }


def table(report: dict[str, Any]) -> str:
    """For people."""
    about = report["machine"]
    wall = about["wall_means_something"]
    lines = [
        f"{about['size']}, {about['steps']} steps, {about['cores']} cores, load {about['load']:.1f}, {about['date']}.",
        f"A process that waits for others in an exchange uses {about['busy_waiting']:.1%} of a core: CPU time is work.",
    ]
    if not wall:
        lines.append(
            "Fewer cores than ranks: step, idle, imbalance and lost come from CPU times and hold; wall times would "
            "measure the queue for the cores and are left out."
        )
    columns = (
        f"  {'mode':26} {'step ms':>8} {'ratio':>6} {'CPU':>5} {'idle':>5} {'imbal.':>6} {'lost':>5} {'coll.':>6} "
        f"{'forecast':>8} {'free':>5} {'ratio':>6} {'held KiB':>9} {'peak':>6} {'host':>6} {'on one':>7}"
    )
    for row in report["modes"]:
        if row["mode"] == "homogeneous":
            lines += ["", heading(row), columns + (f" {'wall ms':>8} {'idle':>5}" if wall else "")]
        plan = row["forecast"]
        lines.append(
            f"  {row['mode']:26} {row['step_ms']:8.0f} {row['ratio']:6.3f} {row['cpu_ratio']:5.2f} {row['idle']:5.0%} "
            f"{row['imbalance']:6.0%} {row['lost']:5.0%} {row['collectives']:6.0f} {plan['lost']:8.0%} "
            f"{plan['lost_free']:5.0%} {row['forecast_ratio']:6.3f} {row['held_kib']:9.0f} {row['peak_kib']:6.0f} "
            f"{row['host_kib']:6.0f} {row['gathered_kib']:7.0f}"
            + (f" {row['wall_ms']:8.0f} {row['wall_idle']:5.0%}" if wall else "")
        )
    lines += ["", "The exchange alone, homogeneous, CPU time per step of a rank of the first stage:"]
    for row in report["exchange"]:
        lines.append(
            f"  {row['layout']:12} {row['routed_ms']:.1f} ms, {row['short_ms']:.1f} ms without moving anything: "
            f"{row['share']:.1%} of its step; {row['collectives']:.0f} of {row['of_collectives']:.0f} collectives; "
            f"largest difference {row['difference']:.1e}"
        )
    return "\n".join(lines)


def heading(row: dict[str, Any]) -> str:
    """What a layout's steps are made of."""
    return (
        f"{row['layout']}: {row['images']:.1f} images a step, {row['feature_share']:.0%} of tokens are features, "
        f"encoder {row['encoder_share']:.0%} of the work; idle {row['text_idle']:.0%} with text alone"
    )


if __name__ == "__main__":
    sys.exit(main())
