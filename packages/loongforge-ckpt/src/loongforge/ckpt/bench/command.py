"""`loongforge bench mtp DIR`: would the further layers of multi-token prediction speed up generation?"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loongforge.core.config.run import RunConfig
from loongforge.core.errors import ConfigError

if TYPE_CHECKING:
    from loongforge.ckpt.bench.acceptance import Acceptance

USAGE = """\
usage: loongforge bench mtp DIR --data-path FILE [--sequences 32] [--json] [layout flags] [overrides]

Reads a Hugging Face directory, or a run with further prediction layers, and text. At every place of the text it
compares what each further layer proposes with the token that the model itself finds most probable there: where they
are equal, speculative decoding accepts the proposal. No text is generated.

  --sequences N      sequences of --seq-length tokens to look at (32)
  --json             print one JSON object
  --mtp-num-layers N further layers of a Hugging Face directory (as its config.json says)
  layout flags       as for train: --tensor-model-parallel-size, --pipeline-model-parallel-size, --nproc-per-node,
                     --seq-length (512), --micro-batch-size, --bf16, --fp32, --training-phase sft

example:
  loongforge bench mtp mimo_7b --data-path text.jsonl --sequences 64 --tensor-model-parallel-size 2
"""


def command(argv: list[str]) -> int:
    """Measure and report."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(USAGE, end="")
        return 0
    directory, sequences, as_json, rest = _split(argv)
    found = acceptance(_config(directory, sequences, rest))
    print(json.dumps(asdict(found), indent=1) if as_json else "\n".join(table(found)))
    return 0


def acceptance(config: RunConfig) -> Acceptance:
    """Run the workers."""
    from loongforge.ckpt.bench.acceptance import measure, summary
    from loongforge.ckpt.workers import run_workers

    with tempfile.TemporaryDirectory(prefix="loongforge-bench-") as scratch:
        answer = Path(scratch) / "counts.pt"
        run_workers(config, partial(measure, answer=str(answer)), "bench mtp")
        import torch

        return summary(torch.load(answer, weights_only=True), config.train.seq_length)


def table(found: Acceptance) -> list[str]:
    """Lines for a terminal."""
    depths = range(1, len(found.rates) + 1)
    lines = ["depth  accepted  with all before"]
    lines += [
        f"{depth:5}  {rate:8.1%}  {chained:15.1%}"
        for depth, rate, chained in zip(depths, found.rates, found.chained, strict=True)
    ]
    lines += ["", "place          " + "  ".join(f"depth {depth}" for depth in depths)]
    lines += [
        f"{f'{first} to {last}':13}  " + "  ".join(f"{rate:7.1%}" for rate in rates)
        for first, last, rates in found.by_position
    ]
    return [*lines, "", f"{found.mean_length:.2f} tokens a pass, over {found.tokens:,} places"]


def _split(argv: list[str]) -> tuple[str, int, bool, list[str]]:
    words, rest, sequences, as_json = list(argv), [], "32", False
    if words[0].startswith("-"):
        raise ConfigError(f"bench mtp: the first argument is the directory of the model, got {words[0]!r}.")
    directory = words.pop(0)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name == "--json":
            as_json = True
        elif name == "--sequences":
            sequences = value if equals else (words.pop(0) if words else "")
        else:
            rest.append(word)
    if not sequences.isdigit() or sequences == "0":
        raise ConfigError(f"--sequences: must be a whole number of at least 1, got {sequences!r}.")
    return directory, int(sequences), as_json, rest


def _config(directory: str, sequences: int, rest: list[str]) -> RunConfig:
    """The run that the flags describe: one batch from that directory, saving nothing."""
    from loongforge.core.config.resolve import resolve

    if not Path(directory).is_dir():
        raise ConfigError(f"bench mtp: no directory {directory!r}.")
    shape = ["--train-iters", "1", "--seq-length", "512", "--global-batch-size", str(sequences)]
    config = resolve(["--load", directory, *_stored(Path(directory)), *shape, *rest])
    problems: list[str] = []
    if not config.model.foundation.geometry.geometry().prediction_layers:
        problems.append(f"bench mtp: the model in {directory} has no further layers: give --mtp-num-layers 1.")
    if config.parallel.context_parallel_size > 1:
        problems.append(
            "bench mtp: sequences stay whole, parallel.context_parallel_size="
            f"{config.parallel.context_parallel_size} must be 1."
        )
    if problems:
        raise ConfigError(*problems)
    return config


def _stored(directory: Path) -> list[str]:
    """The flag for all further layers that a Hugging Face directory says it has, one where it says nothing."""
    from loongforge.ckpt.hf.directory import detect, read_config

    if not detect(directory):
        return []
    return ["--mtp-num-layers", str(read_config(directory).get("num_nextn_predict_layers") or 1)]
