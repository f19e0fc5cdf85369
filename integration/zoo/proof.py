"""Our side of every proof: what one worker of the trainer does with the checkpoint of a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from case import LAYOUTS, Case

from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import RunConfig

Batch = Mapping[str, torch.Tensor]

SEQUENCES, LENGTH = 4, 32
ROUND, GRADIENTS, WEIGHTS = "round", "gradients", "weights"
"""Directories that the workers leave."""


def config_of(case: Case, directory: Path, layout: str, *flags: str, precision: str = "fp32") -> RunConfig:
    """A short run from `directory`; later flags win."""
    shape = ["--seq-length", LENGTH, "--micro-batch-size", 1, "--global-batch-size", SEQUENCES, "--train-iters", 10]
    words = ["--load", directory, f"--{precision}", *shape, *case.flags, *LAYOUTS[layout][0], *flags]
    return resolve(list(map(str, words)), note=lambda _: None)


def two_ranks(case: Case) -> str:
    """The layout of two ranks that says most about this case."""
    return next(layout for layout in ("tp2-sp-ep2", "tp2-sp", "tp2", "pp2", "one") if layout in case.layouts)


def prove(worker: Any, config: RunConfig, scratch: Path) -> None:
    """Load, write an export at once, then logits, loss and gradients: what `ours` of the verifier puts together."""
    from loongforge.ckpt.verify.measure import measure_part
    from loongforge.ckpt.workers import part_of

    with part_of(config) as part:
        _load(part)
        _export(part, scratch / ROUND)
        measure_part(part, scratch)


def pass_through(worker: Any, config: RunConfig, scratch: Path) -> None:
    """Load and write an export."""
    from loongforge.ckpt.workers import part_of

    with part_of(config) as part:
        _load(part)
        _export(part, scratch / ROUND)


def one_batch(worker: Any, config: RunConfig, micro_batches: Sequence[Batch], scratch: Path) -> tuple[float, int]:
    """Loss and loss tokens of given micro-batches, and their gradients in `GRADIENTS`."""
    from loongforge.ckpt.verify.measure import write_gradients
    from loongforge.ckpt.workers import part_of
    from loongforge.core.step.forward import forward_backward
    from loongforge.core.step.optimizer import build_training

    with part_of(config) as part:
        _load(part)
        training = build_training(part.plan, part.world, part.model)
        for chunk in training.chunks:
            chunk.zero_grad_buffer()
        mine = list(micro_batches[part.world.dp.rank() :: part.world.dp.size()])
        seen = forward_backward(part.plan, part.world, training.chunks, mine, forward_only=False)
        write_gradients(part, scratch / GRADIENTS)
    return seen


def one_step(worker: Any, config: RunConfig, batch: Batch, scratch: Path) -> Any:
    """What one optimizer step measured (StepResult), and its gradients in `GRADIENTS`; give it a rate of 0."""
    from loongforge.ckpt.verify.batch import rows_of
    from loongforge.ckpt.verify.measure import write_gradients
    from loongforge.ckpt.workers import part_of
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import build_training

    with part_of(config) as part:
        _load(part)
        training = build_training(part.plan, part.world, part.model)
        rows = rows_of(part.plan, part.world.dp.rank())
        mine = [{name: tensor[row] for name, tensor in batch.items()} for row in rows]
        result = train_step(part.plan, part.world, training, mine, 0)
        write_gradients(part, scratch / GRADIENTS)
    return result


def train(worker: Any, config: RunConfig, batches: Sequence[Batch], scratch: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of one optimizer step for each batch, and the weights afterwards in `WEIGHTS`."""
    from loongforge.ckpt.verify.batch import rows_of
    from loongforge.ckpt.workers import part_of
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import build_training, gather_parameters

    seen = []
    with part_of(config) as part:
        _load(part)
        training = build_training(part.plan, part.world, part.model)
        for step, batch in enumerate(batches):
            rows = rows_of(part.plan, part.world.dp.rank())
            mine = [{name: tensor[row] for name, tensor in batch.items()} for row in rows]
            result = train_step(part.plan, part.world, training, mine, step)
            seen.append((result.loss, result.grad_norm))
        gather_parameters(training.chunks)
        _export(part, scratch / WEIGHTS)
    return seen


def _load(part: Any) -> None:
    from loongforge.core.checkpoint.load import load_weights
    from loongforge.core.checkpoint.start import find_start

    load_weights(part.plan, part.world, part.model, find_start(part.plan.config.checkpoint))


def _export(part: Any, path: Path) -> None:
    from loongforge.core.checkpoint.export import export_hf

    export_hf(part.plan, part.world, part.model, path)


def read(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face directory as it lies there."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    assert tensors, f"nothing in {directory}"
    return tensors
