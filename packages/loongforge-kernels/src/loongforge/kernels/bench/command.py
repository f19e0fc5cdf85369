"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from loongforge.kernels.bench import ops
from loongforge.kernels.bench.dsa_inputs import DIMS
from loongforge.kernels.bench.dsa_peers import PEERS
from loongforge.kernels.bench.timing import Ceilings, Row, ceilings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ABOUT = """\
Check an op against fp64 or plain torch, then measure it against what one would use without it. Prints time (lower
quartile), TFLOP/s of the arithmetic that the result needs, its share of a large matrix product measured in the same
run, and memory beyond the inputs. Exit code 1: a result is wrong, and nothing more is measured.
"""
EXAMPLES = """\
examples:
  loongforge bench kernels --op dsa
  loongforge bench kernels --op dsa --length 8192 32768 --heads 128 --speeds h200.json --json > h200-dsa.json
  loongforge bench kernels --op rms_norm --dtype fp32 --repeat 5
"""


def command(argv: list[str]) -> int:
    """Check, measure, print; 1 when a result is wrong."""
    options = _parser().parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    if wrong := _wrong(options, device, dtype):
        print(f"bench kernels: {wrong}", file=sys.stderr)
        return 2
    limits = ceilings(device, dtype, options.repeat)
    head = {
        "device": limits.device, "dtype": str(dtype)[6:], "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__, "matmul TFLOP/s": round(limits.matmul, 2), "copy TB/s": round(limits.copy, 3),
    }  # fmt: skip
    if not options.json:
        print(", ".join(f"{name} {value}" for name, value in head.items()), flush=True)
    rows: list[Row] = []
    try:
        for row in (_dsa if options.op == "dsa" else _small)(options, device, dtype):
            rows.append(row)
            if not options.json:
                print(_line(row, limits), flush=True)
    except AssertionError as wrong:
        print(f"bench kernels: wrong result, nothing more is measured: {wrong}", file=sys.stderr)
        return 1
    if options.speeds:
        _save_speeds(rows, limits, options.speeds)
    if options.json:
        print(json.dumps({**head, "rows": [{**asdict(row), "rate": row.rate} for row in rows]}, indent=1))
    else:
        print("\n".join(_ratios(rows)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loongforge bench kernels", description=ABOUT, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--op", choices=("dsa", *ops.OPS), default="dsa", help="what to measure (dsa)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the GPU where there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--repeat", type=int, default=10, help="measurements of each call (10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    sparse = parser.add_argument_group("dsa")
    sparse.add_argument("--model", choices=tuple(DIMS), default="deepseek_v3_2", help="whose widths (deepseek_v3_2)")
    sparse.add_argument("--length", type=int, nargs="+", help="tokens (8192 32768 65536; 256 on a CPU)")
    sparse.add_argument("--heads", type=int, nargs="+", help="heads of one rank (128 16; 4 on a CPU)")
    sparse.add_argument("--topk", type=int, help="keys of each query (2048; 64 on a CPU)")
    sparse.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=tuple(PEERS), help="all, when not given")
    sparse.add_argument(
        "--speeds", type=Path, metavar="FILE", help="write the table of the first shape for kernels.dsa.plan to FILE"
    )
    return parser


def _wrong(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> str | None:
    """What cannot be measured, before minutes are spent on it."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no GPU here; leave it out, or say cpu."
    for name in ("repeat", "length", "heads", "topk"):
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                return f"--{name} {value} must be at least 1."
    if options.op == "dsa" and device.type == "cuda" and dtype == torch.float32:
        return "--dtype fp32: the kernels of a GPU take bf16 or fp16; say one of them, or --device cpu."
    if options.speeds and (options.op != "dsa" or not options.speeds.absolute().parent.is_dir()):
        return f"--speeds {options.speeds}: the table is made with --op dsa, into a folder that exists."
    return None


def _dsa(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    from loongforge.kernels.bench import dsa
    from loongforge.kernels.bench.dsa_inputs import make

    on_gpu, dims = device.type == "cuda", DIMS[options.model]
    lengths = options.length or ([8192, 32768, 65536] if on_gpu else [256])
    topk = options.topk or (2048 if on_gpu else 64)
    for heads in options.heads or ([128, 16] if on_gpu else [4]):
        errors = dsa.check(dims, heads, device, dtype, options.peers)
        for length in lengths:
            inputs = make(dims, length, heads, topk, device, dtype)
            case = f"{options.model} S={length} H={heads} K={topk}"
            yield from dsa.measure(inputs, case, options.repeat, errors)


def _small(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    from loongforge.kernels.registry import Registry

    kernels = Registry.installed(say=None if options.json else print)
    yield from ops.measure(options.op, device, dtype, kernels, options.repeat)


def _line(row: Row, limits: Ceilings) -> str:
    name = f"{row.case:40} {row.rival:26} {row.what:10}"
    if row.timing is None:
        return f"{name} not measured: {row.note}"
    limit, plain = (limits.matmul, "product") if row.unit == "TFLOP" else (limits.copy, "copy")
    rate = "" if row.rate is None else f" {row.rate:8.3f} {row.unit}/s ({row.rate / limit:4.0%} of a {plain})"
    memory = "" if row.timing.mib is None else f" {row.timing.mib:9.0f} MiB"
    return f"{name} {row.timing.milliseconds:10.3f} ms{memory}{rate} {row.note}".rstrip()


def _ratios(rows: list[Row]) -> Iterator[str]:
    """How many times as long the rivals of a whole case take."""
    for case in dict.fromkeys(row.case for row in rows):
        whole = {
            row.rival: row.timing.milliseconds
            for row in rows
            if row.case == case and row.what == "both" and row.timing is not None
        }
        best = min((rival for rival in whole if rival.startswith("ours")), key=lambda rival: whole[rival])
        yield f"{case}: {best} is 1.00; " + ", ".join(
            f"{rival} {time / whole[best]:.2f}" for rival, time in whole.items() if rival != best
        )


def _save_speeds(rows: list[Row], limits: Ceilings, path: Path) -> None:
    from loongforge.kernels.bench.dsa import speeds

    speeds([row for row in rows if row.case == rows[0].case], limits).save(path)
    print(f"Wrote {path}: kernels.dsa.plan(shape, Speeds.load(...)) decides by it.", file=sys.stderr)
