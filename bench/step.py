"""Time and memory of a training step against transformers + torch AdamW: same model, same batch, one process each.

    uv run python bench/step.py                       # every size, fp32 and bf16
    uv run python bench/step.py --size 7m --precision fp32 --steps 20

Both sides run in processes of their own and take turns, step by step, so that whatever else the machine does
meets both.

Before any time is printed the losses of all steps are compared; a difference ends the benchmark with exit code 1.
The ratio is ours / theirs, median over steps: below 1 we are faster.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SIZES = {
    # name: hidden, layers, heads, groups, head width, ffn, vocabulary, sequence, batch
    "tiny": (64, 4, 4, 2, 16, 192, 128, 32, 4),
    "7m": (256, 4, 4, 2, 64, 1024, 8192, 256, 4),
    "100m": (768, 12, 12, 4, 64, 2048, 16384, 512, 2),
}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Largest relative loss difference. bf16: theirs keeps its weights in bf16, which rounds small updates away."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of one side."""

    loss: float
    wall: float
    cpu: float


def main() -> int:
    """Run what the arguments say and print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, action="append")
    parser.add_argument("--precision", choices=("fp32", "bf16"), action="append")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [
        compare(size, precision, arguments.steps, arguments.threads)
        for size in arguments.size or SIZES
        for precision in arguments.precision or ("fp32", "bf16")
    ]
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            print(
                f"{row['size']:>5} {row['precision']}  ours {row['ours_ms']:8.1f} ms  theirs {row['theirs_ms']:8.1f} ms"
                f"  ratio {row['ratio']:.3f} (wall {row['wall_ratio']:.3f})  peak {row['ours_peak_mib']:.0f} / "
                f"{row['theirs_peak_mib']:.0f} MiB  loss difference {row['loss_difference']:.1e}"
            )
    wrong = [row for row in rows if row["loss_difference"] > TOLERANCE[row["precision"]]]
    for row in wrong:
        print(f"{row['size']} {row['precision']}: the losses differ, its times mean nothing.", file=sys.stderr)
    return 1 if wrong else 0


def compare(size: str, precision: str, steps: int, threads: int) -> dict[str, Any]:
    """Both sides through the same steps, in turns; CPU time per step, medians without the first two steps."""
    with tempfile.TemporaryDirectory(prefix="loongforge-bench-") as name:
        context = multiprocessing.get_context("spawn")
        directory = Path(name) / "model"
        maker = context.Process(target=make_model, args=(size, str(directory)))
        maker.start()
        maker.join()
        sides = {}
        for side, body in (("ours", run_ours), ("theirs", run_theirs)):
            here, there = context.Pipe()
            process = context.Process(target=body, args=(there, str(directory), size, precision, threads))
            process.start()
            assert here.recv() == "ready"
            sides[side] = (process, here)
        seen: dict[str, list[Step]] = {"ours": [], "theirs": []}
        for number in range(steps + 2):
            for side, (_, pipe) in sides.items():
                pipe.send(number)
                seen[side].append(pipe.recv())
        peaks = {}
        for side, (process, pipe) in sides.items():
            pipe.send(None)
            peaks[side] = pipe.recv() / 2**20
            process.join()
    pairs = list(zip(seen["ours"], seen["theirs"], strict=True))
    timed = pairs[2:]
    return {
        "size": size,
        "precision": precision,
        "threads": threads,
        "ours_ms": 1e3 * statistics.median(ours.cpu for ours, _ in timed),
        "theirs_ms": 1e3 * statistics.median(theirs.cpu for _, theirs in timed),
        "ratio": statistics.median(ours.cpu / theirs.cpu for ours, theirs in timed),
        "wall_ratio": statistics.median(ours.wall / theirs.wall for ours, theirs in timed),
        "ours_peak_mib": peaks["ours"],
        "theirs_peak_mib": peaks["theirs"],
        "loss_difference": max(abs(ours.loss - theirs.loss) / theirs.loss for ours, theirs in pairs),
    }


def make_model(size: str, directory: str) -> None:
    """A random Qwen3 written by transformers."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, layers, heads, groups, width, ffn, vocabulary, length, _ = SIZES[size]
    torch.manual_seed(0)
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=groups, head_dim=width, max_position_embeddings=length,
            tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    ).save_pretrained(directory)  # fmt: skip


def batch_of(size: str, number: int) -> dict[str, Any]:
    """The batch of a step: random tokens from the step's number."""
    import torch

    *_, vocabulary, length, rows = SIZES[size]
    text = torch.randint(vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(number))
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": torch.ones(rows, length),
        "position_ids": torch.arange(length).expand(rows, length).contiguous(),
    }


def serve(pipe: Connection, step: Any) -> None:
    """Answer step numbers with what the step took, and None with the peak memory."""
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step(number)
        pipe.send(Step(loss=loss, wall=time.perf_counter() - wall, cpu=time.process_time() - cpu))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def run_ours(pipe: Connection, directory: str, size: str, precision: str, threads: int) -> None:
    """The trainer's own step."""
    import torch

    torch.set_num_threads(threads)
    from loongforge.core import env
    from loongforge.core.config.resolve import resolve
    from loongforge.core.plan import Plan
    from loongforge.core.platform import choose

    *_, length, rows = SIZES[size]
    words = f"--load {directory} --{precision} --seq-length {length} --micro-batch-size {rows} --train-iters 100000"
    config = resolve(
        [*words.split(), "--lr", "1e-4", "--min-lr", "1e-4", "--weight-decay", "0.01", "--clip-grad", "1.0"]
    )
    platform = choose("cpu").platform()
    from loongforge.core.megatron.start import start_megatron

    start_megatron(platform)
    from loongforge.core.checkpoint.load import load_weights
    from loongforge.core.checkpoint.start import find_start
    from loongforge.core.megatron.groups import join
    from loongforge.core.model.build import build_model
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import build_training

    plan = Plan.of(config, 1)
    worker = env.Worker(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="single")
    with join(plan.layout, worker, platform, 5) as world:
        model = build_model(plan, world, fresh=())
        load_weights(plan, world, model, find_start(config.checkpoint))
        training = build_training(plan, world, model)
        serve(pipe, lambda number: train_step(plan, world, training, [batch_of(size, number)], number).loss)


def run_theirs(pipe: Connection, directory: str, size: str, precision: str, threads: int) -> None:
    """transformers with torch AdamW (fused, its fastest on CPU), as its Trainer steps."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def step(number: int) -> float:
        batch = batch_of(size, number)
        optimizer.zero_grad()
        # shift_labels: transformers' own loss without shifting again
        loss = model(input_ids=batch["tokens"], labels=batch["labels"], shift_labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    serve(pipe, step)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
