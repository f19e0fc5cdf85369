"""Training steps with `data.balance` and without, in turn, on conversations of unequal length.

    uv run python bench/balance_training.py [--ranks 2] [--steps 12] [--length 2048] [--micro-batches 1]

A small Qwen3 (hidden 256, 4 layers) in fp32 on packed sequences, one thread a rank. Checks first that both ways the
first step holds the same documents and has the same loss and gradient norm. `wall` is the clock, which other work on
the machine or more ranks than cores spoil; `busiest` the greatest CPU time of a rank, which they do not (a process that
waits in gloo uses next to none). `forecast` is what the deals promised.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import RunConfig
from loongforge.core.testing import run_distributed

TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + ':' + message.content + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"""
SIZES = {
    "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 64, "vocab_size": 260,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What one rank measured, by way."""

    seconds: dict[str, list[float]]
    """CPU time of each step."""
    walls: dict[str, list[float]]
    numbers: list[dict[str, float]]
    first: dict[str, tuple[float, float, list[bytes]]]
    """Loss, gradient norm and documents of the first step."""


def write_files(folder: Path, length: int) -> None:
    """A tokenizer of bytes, and conversations with log-normal lengths."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    drawn = np.random.default_rng(0).lognormal(np.log(length / 12), 1.1, 1500).clip(8, length - 40).astype(int)
    rows = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "a" * size}] for size in drawn.tolist()]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


def config_of(folder: Path, options: argparse.Namespace, *more: str) -> RunConfig:
    """The run; later words win."""
    words = ["--model-name", "qwen3_0_6b", "--sft", "--fp32", "--data-path", folder / "rows.jsonl", "--seed", "5"]
    words += ["--hf-tokenizer-path", folder, "--data-cache-path", folder / "cache", "--num-workers", "0"]
    words += ["--seq-length", options.length, "--train-iters", options.steps + 1, "--lr", "0"]
    words += ["--global-batch-size", options.ranks * options.micro_batches]
    sizes = [f"model.foundation.{name}={value}" for name, value in SIZES.items()]
    return resolve([*map(str, words), *sizes, *more], note=lambda _: None)


def work(worker: Any, configs: dict[str, RunConfig]) -> Rank:
    """All steps of one rank, both ways in turn; the weights never change."""
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.start import find_start
    from loongforge.core.data.open import open_data
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import build_training

    torch.set_num_threads(1)
    plain = configs["by position"]
    seconds: dict[str, list[float]] = {way: [] for way in configs}
    walls: dict[str, list[float]] = {way: [] for way in configs}
    first: dict[str, tuple[float, float, list[bytes]]] = {}
    numbers: list[dict[str, float]] = []
    with part_of(plain) as part:
        training = build_training(part.plan, part.world, part.model)
        data = open_data(part.plan, part.world, find_start(plain.checkpoint))
        from loongforge.data.balance.step import open_analytic

        even = replace(data, balancer=open_analytic(part.plan))
        with data.loader(0) as one, even.loader(0) as two:
            for step in range(plain.train.train_iters or 0):
                for way, loader in (("by position", one), ("balanced", two)):
                    batches = loader.step()
                    part.world.barrier()
                    began, clock = time.process_time(), time.perf_counter()
                    result = train_step(part.plan, part.world, training, batches, step)
                    if step:  # the first step makes what later ones reuse
                        seconds[way].append(time.process_time() - began)
                        walls[way].append(time.perf_counter() - clock)
                    else:
                        first[way] = (result.loss, result.grad_norm, _documents(batches))
                if step and two.deal is not None:
                    numbers.append(dict(two.deal.numbers))
    return Rank(seconds=seconds, walls=walls, numbers=numbers, first=first)


def _documents(batches: list[dict[str, Any]]) -> list[bytes]:
    return [
        batch["tokens"][0, start:end].numpy().tobytes()
        for batch in batches
        for start, end in pairwise(batch["cu_seqlens"].tolist())
        if batch["loss_mask"][0, start:end].any()
    ]


def check(ranks: list[Rank]) -> None:
    """The same step, both ways."""
    seen = {way: sorted(one for rank in ranks for one in rank.first[way][2]) for way in ranks[0].first}
    assert seen["balanced"] == seen["by position"], "other documents"
    for number in (0, 1):
        one, other = (ranks[0].first[way][number] for way in ("by position", "balanced"))
        assert abs(float(one) - float(other)) < 1e-5 * float(one), "another loss or gradient norm"  # pyright: ignore


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--micro-batches", type=int, default=1)
    options = parser.parse_args()
    from loongforge.core.megatron.start import preload
    from loongforge.core.platform import choose

    torch.set_num_threads(1)
    preload(choose("cpu").platform())
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), options.length)
        configs = {"by position": config_of(Path(folder), options), "balanced": config_of(Path(folder), options)}
        ranks = run_distributed(partial(work, configs=configs), options.ranks, timeout=900)
    check(ranks)
    print("| way | wall, ms | busiest, ms | waits |\n|---|---|---|---|")
    found: dict[str, tuple[float, float]] = {}
    for way in configs:
        cpu, wall = (np.array([getattr(rank, name)[way] for rank in ranks]) for name in ("seconds", "walls"))
        busiest = cpu.max(axis=0).mean()
        found[way] = float(wall.max(axis=0).mean()), float(busiest)
        print(f"| {way} | {1e3 * found[way][0]:.0f} | {1e3 * busiest:.0f} | {1 - cpu.mean() / busiest:.1%} |")
    told = ranks[0].numbers
    forecast = sum(one["balance_ratio"] for one in told) / sum(one["balance_before"] for one in told)
    wall, busiest = (two / one for one, two in zip(found["by position"], found["balanced"], strict=True))
    print(f"ratio: wall {wall:.3f}, busiest {busiest:.3f}, forecast {forecast:.3f}")


if __name__ == "__main__":
    main()
