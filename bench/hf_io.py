"""Throughput and host memory of loading and exporting Hugging Face weights, against a plain copy of the same files.

    uv run python bench/hf_io.py [--hidden 1024 --layers 8] [--ranks 1 4] [--rounds 3]

Ranks share the model by tensor parallelism, so each reads and writes its own part. Checks first that what was exported
is what was loaded, bit for bit. Prints MB/s of the whole model and the ratio to `shutil.copyfile` plus fsync of the
same bytes in the same run (above 1 we are faster than the copy), the best of all rounds of each, and how far memory
rose above what the rank held before, weights included: the most of any rank, in MiB and relative to the part of the
weights that it holds. Pages of mapped files, which the kernel takes back when it needs them, do not count.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from loongforge.core.testing import run_distributed


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One rank's load or export."""

    seconds: float
    peak: int
    """Bytes above what the process held before."""
    held: int
    """Bytes of this rank's parameters."""


def make(directory: Path, hidden: int, layers: int) -> None:
    """A random Qwen3 in bf16, written by transformers in shards."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32000, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(directory, max_shard_size="100MB")


def copy(source: Path, target: Path) -> float:
    """Seconds to copy every safetensors file and flush it."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    began = time.perf_counter()
    for file in source.glob("*.safetensors"):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb+") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - began


def ride(worker: Any, source: Path, out: Path, rounds: int) -> list[tuple[Measured, Measured]]:
    """Load and export on one of the ranks, again and again."""
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.export import export_hf
    from loongforge.core.checkpoint.load import load_weights
    from loongforge.core.checkpoint.start import find_start
    from loongforge.core.config.resolve import resolve

    layout = ["--tensor-model-parallel-size", str(worker.world_size)]
    config = resolve(["--load", str(source), "--bf16", "--seq-length", "32", "--train-iters", "1", *layout])
    with part_of(config) as part:
        held = sum(parameter.nbytes for chunk in part.model.chunks for parameter in chunk.parameters())
        with torch.no_grad():
            for chunk in part.model.chunks:
                for parameter in chunk.parameters():
                    parameter.zero_()  # or the weights themselves would count as memory of the load
        load = partial(load_weights, part.plan, part.world, part.model, find_start(config.checkpoint))
        export = partial(export_hf, part.plan, part.world, part.model, out)
        return [(measure(load, held), measure(export, held)) for _ in range(rounds)]


def measure(work: Callable[[], Any], held: int) -> Measured:
    """Run `work` and watch the clock and the memory."""
    before, most, done = anonymous(), [0], Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous())

    watcher = Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        work()
        seconds = time.perf_counter() - began
    finally:
        done.set()
        watcher.join()
    return Measured(seconds=seconds, peak=max(0, most[0] - before), held=held)


def anonymous() -> int:
    """Resident bytes of this process that are no pages of a file."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "the kernel says RssAnon"
    return int(found[1]) * 1024


def differs(source: Path, out: Path) -> bool:
    """Whether any tensor is another one."""
    from safetensors.torch import load_file

    before = {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}
    after = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    return before.keys() != after.keys() or any(not torch.equal(before[k], after[k]) for k in before)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loongforge-bench-") as name:
        folder = Path(name)
        make(folder / "source", arguments.hidden, arguments.layers)
        size = sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors")) / 1e6
        print(f"{size:.0f} MB of weights")
        copied = min(copy(folder / "source", folder / "copy") for _ in range(arguments.rounds))
        print(f"{'copy':>6}          {size / copied:8.0f} MB/s  1.00 x copy")
        for ranks in arguments.ranks:
            out = folder / f"out-{ranks}"
            copied = min(copied, copy(folder / "source", folder / "copy"))
            work = partial(ride, source=folder / "source", out=out, rounds=arguments.rounds)
            seen = run_distributed(work, ranks)
            if differs(folder / "source", out):
                print(
                    f"{ranks} ranks: the export differs from what was loaded: its times mean nothing.", file=sys.stderr
                )
                return 1
            turns = list(zip(*seen, strict=True))  # by round, then by rank
            for at, what in enumerate(("load", "export")):
                print(line(what, size, copied, [[rank[at] for rank in turn] for turn in turns]))
    return 0


def line(what: str, size: float, copied: float, turns: list[list[Measured]]) -> str:
    """The slowest rank's time in the best round, and the greediest rank's memory in the worst."""
    seconds = min(max(one.seconds for one in turn) for turn in turns)
    worst = max((one for turn in turns for one in turn), key=lambda one: one.peak)
    ranks = f"{len(turns[0])} rank{'s' if len(turns[0]) > 1 else ' '}"
    speed = f"{size / seconds:8.0f} MB/s  {copied / seconds:.2f} x copy"
    return f"{what:>6} {ranks} {speed}  {worst.peak / 2**20:6.0f} MiB more, {worst.peak / worst.held:.2f} of its part"


if __name__ == "__main__":
    sys.exit(main())
