"""`loongforge verify HF_DIR`: is our model the one that transformers loads from there?"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loongforge.core.config.run import RunConfig
from loongforge.core.errors import ConfigError

if TYPE_CHECKING:
    from loongforge.ckpt.verify.difference import Difference

TOLERANCE = 1e-4
"""Relative. Tiny fp32 models are measured at 1e-6; rounding grows with depth and width, mistakes are above 1e-2."""

USAGE = """\
usage: loongforge verify HF_DIR [--tolerance 1e-4] [--json] [layout flags] [overrides]

Loads HF_DIR with transformers and with LoongForge, runs the same random batch through both in fp32, and compares
logits, loss and the gradient of every tensor. Exit code 0 when all are within the tolerance, 1 otherwise.

  --tolerance X   largest difference of an entry relative to the tensor's largest entry
  --json          print one JSON object
  layout flags    as for train: --tensor-model-parallel-size, --pipeline-model-parallel-size, --context-parallel-size,
                  --sequence-parallel, --nproc-per-node, --seq-length, --micro-batch-size, --global-batch-size, --seed

examples:
  loongforge verify Qwen3-0.6B
  loongforge verify Qwen3-0.6B --tensor-model-parallel-size 2 --sequence-parallel --json
"""


def command(argv: list[str]) -> int:
    """Compare and report; 0 when everything is within the tolerance."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(USAGE, end="")
        return 0
    directory, tolerance, as_json, rest = _split(argv)
    if find_spec("transformers") is None:
        raise ConfigError(
            "loongforge verify compares with transformers, which is not installed: pip install transformers"
        )
    config = _config(directory, rest)
    found = compare(config, Path(directory))
    passed = all(one.worst <= tolerance for one in found)
    print(_json(found, tolerance, passed) if as_json else _table(found, tolerance, passed))
    return 0 if passed else 1


def compare(config: RunConfig, directory: Path) -> list[Difference]:
    """Run both sides; the differences, worst first."""
    from loongforge.ckpt.verify.measure import measure
    from loongforge.ckpt.verify.reference import BATCH, run_reference
    from loongforge.ckpt.workers import run_workers, workers_of

    with tempfile.TemporaryDirectory(prefix="loongforge-verify-") as name:
        scratch = Path(name)
        run_workers(config, partial(measure, scratch=name), "verify")
        from safetensors.torch import save_file

        from loongforge.ckpt.verify.batch import make_batch
        from loongforge.ckpt.verify.difference import differences, ours, theirs
        from loongforge.core.plan import Plan

        plan = Plan.of(config, workers_of(config))
        save_file(make_batch(config, plan.global_batch_size), scratch / BATCH)
        run_reference(directory, scratch)
        return differences(ours(plan, scratch), theirs(scratch))


def _split(argv: list[str]) -> tuple[str, float, bool, list[str]]:
    words, rest, tolerance, as_json = list(argv), [], TOLERANCE, False
    if words[0].startswith("-"):
        raise ConfigError(f"verify: the first argument is the Hugging Face directory, got {words[0]!r}.")
    directory = words.pop(0)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name == "--json":
            as_json = True
        elif name == "--tolerance":
            tolerance = _number(value if equals else (words.pop(0) if words else ""))
        else:
            rest.append(word)
    return directory, tolerance, as_json, rest


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--tolerance: must be a number, got {text!r}.") from None


def _config(directory: str, rest: list[str]) -> RunConfig:
    """The run that the flags describe: one step in fp32 from that directory, saving nothing."""
    from loongforge.core.config.resolve import resolve

    if not Path(directory).is_dir():
        raise ConfigError(f"verify: no directory {directory!r}.")
    defaults = ["--load", directory, "--fp32", "--train-iters", "1", "--seq-length", "32", "--micro-batch-size", "2"]
    config = resolve([*defaults, *rest])
    problems: list[str] = []
    if config.model.image_encoder is not None:
        problems.append(
            f"verify: {directory} holds a model that sees, and verify compares language models alone. Give a directory "
            "of its language model."
        )
    if config.train.precision != "fp32":
        problems.append("verify: compares in fp32, where the two sides may differ by rounding alone; leave out --bf16.")
    if config.parallel.use_distributed_optimizer or config.parallel.overlap_grad_reduce:
        problems.append(
            "verify: compares whole gradients; leave out --use-distributed-optimizer and --overlap-grad-reduce."
        )
    if problems:
        raise ConfigError(*problems)
    return config


def _json(found: list[Difference], tolerance: float, passed: bool) -> str:
    tensors = {one.name: {"relative": _finite(one.worst), "absolute": _finite(one.absolute)} for one in found}
    return json.dumps(
        {"passed": passed, "tolerance": tolerance, "worst": found[0].name, "differences": tensors}, indent=1
    )


def _finite(value: float) -> Any:
    """JSON knows no infinity."""
    return value if value < float("inf") else "inf"


def _table(found: list[Difference], tolerance: float, passed: bool) -> str:
    width = max(len(one.name) for one in found)
    lines = [f"{'':{width}}   relative   absolute"]
    lines += [
        f"{one.name:{width}}  {one.worst:9.2e}  {one.absolute:9.2e}" + ("  <--" if one.worst > tolerance else "")
        for one in found
    ]
    verdict = "equal" if passed else "DIFFERENT"
    return "\n".join([*lines, f"{verdict}: worst {found[0].worst:.2e} ({found[0].name}), tolerance {tolerance:g}"])
