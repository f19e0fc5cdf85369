"""Run the trainer on given micro-batches in a given layout, and transformers on the same sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import RunConfig
from loongforge.core.testing import run_distributed

Batch = dict[str, Any]
Tensors = dict[str, torch.Tensor]

VOCABULARY = 131

TP2_SP = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
ZERO1 = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
LAYOUTS = {"one": ([], 1), "tp2-sp": (TP2_SP, 2), "pp2": (PP2, 2), "cp2": (CP2, 2)}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run measured."""

    losses: list[float]
    """Per step."""
    loss_tokens: list[int]
    norms: list[float]
    """Gradient norm per step; empty when only gradients were asked for."""
    tensors: Tensors
    """Gradients, or weights after the steps, whole and under their Hugging Face names."""
    extra: list[Any]
    """What `look` returned on every rank."""


def config_of(
    directory: Path, flags: Sequence[str], *, length: int = 32, mbs: int = 1, gbs: int = 4, precision: str = "fp32"
) -> RunConfig:
    """A short run from `directory`; later flags win."""
    shape = ["--seq-length", length, "--micro-batch-size", mbs, "--global-batch-size", gbs, "--train-iters", 3]
    return resolve(["--load", str(directory), f"--{precision}", *map(str, shape), *flags])


def random_batch(rows: int, length: int, seed: int, *, keep: float = 0.8) -> Batch:
    """Random text with its successors as labels; `keep` of the positions count."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": (torch.rand(rows, length, generator=generator) < keep).float(),
        "position_ids": torch.arange(length).expand(rows, length).contiguous(),
        "sample_ids": torch.arange(rows) + rows * seed,
    }


def gradients(config: RunConfig, world: int, batches: Sequence[Batch], scratch: Path) -> Result:
    """Loss and every gradient of one step over the global batch; micro-batch m of rank r is `batches[m * dp + r]`."""
    out = scratch / "gradients"
    seen = run_distributed(partial(_gradients, config=config, batches=batches, out=out), world)
    loss, tokens = seen[0]
    assert all(other == seen[0] for other in seen), "all ranks know the same loss"
    return Result(losses=[loss], loss_tokens=[tokens], norms=[], tensors=read(out), extra=[])


def steps(
    config: RunConfig,
    world: int,
    batches: Sequence[Sequence[Batch]],
    scratch: Path,
    look: Callable[..., Any] | None = None,
) -> Result:
    """Train over one global batch per step, then export; `look(part, training)` runs on every rank at the end."""
    out = scratch / "weights"
    seen = run_distributed(partial(_steps, config=config, batches=batches, out=out, look=look), world)
    results = seen[0][0]
    return Result(
        losses=[one.loss for one in results],
        loss_tokens=[one.loss_tokens for one in results],
        norms=[one.grad_norm for one in results],
        tensors=read(out),
        extra=[extra for _, extra in seen],
    )


def my_part(part: Any, batches: Sequence[Batch]) -> list[Batch]:
    """The micro-batches of this data parallel rank."""
    mine = list(batches[part.world.dp.rank() :: part.world.dp.size()])
    assert len(mine) == part.plan.num_microbatches, "the test gives a whole global batch"
    return mine


def built(part: Any) -> Any:
    """The training of this part, from the weights of `--load`."""
    from loongforge.core.checkpoint.load import load_weights
    from loongforge.core.checkpoint.start import find_start
    from loongforge.core.step.optimizer import build_training

    load_weights(part.plan, part.world, part.model, find_start(part.plan.config.checkpoint))
    return build_training(part.plan, part.world, part.model)


def _gradients(worker: Any, config: RunConfig, batches: Sequence[Batch], out: Path) -> tuple[float, int]:
    from loongforge.ckpt.workers import part_of
    from loongforge.core.step.forward import forward_backward

    with part_of(config) as part:
        training = built(part)
        for chunk in training.chunks:
            chunk.zero_grad_buffer()
        seen = forward_backward(part.plan, part.world, training.chunks, my_part(part, batches), forward_only=False)
        with torch.no_grad():
            for chunk in part.model.chunks:
                for parameter in chunk.parameters():
                    # The export maps gradients as it maps parameters.
                    parameter.copy_(parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter))
        _export(part, out)
    return seen


def _steps(
    worker: Any, config: RunConfig, batches: Sequence[Sequence[Batch]], out: Path, look: Callable[..., Any] | None
) -> tuple[list[Any], Any]:
    from loongforge.ckpt.workers import part_of
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import gather_parameters

    with part_of(config) as part:
        training = built(part)
        results = [
            train_step(part.plan, part.world, training, my_part(part, batch), step)
            for step, batch in enumerate(batches)
        ]
        gather_parameters(training.chunks)
        extra = look(part, training) if look else None
        _export(part, out)
    return results, extra


def _export(part: Any, out: Path) -> None:
    from loongforge.core.checkpoint.export import export_hf

    export_hf(part.plan, part.world, part.model, out)


def read(directory: Path) -> Tensors:
    """Every tensor of a Hugging Face directory, fp32."""
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(file).items()}
    assert tensors, f"nothing in {directory}"
    return tensors


def transformers_alone(directory: Path, sequences: Sequence[Batch]) -> Result:
    """transformers on each `[1, length]` sequence by itself: mean loss over all unmasked tokens, and its gradients."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    count = sum(float(sequence["loss_mask"].sum()) for sequence in sequences)
    total = 0.0
    for sequence in sequences:
        logits = model(input_ids=sequence["tokens"]).logits
        losses = torch.nn.functional.cross_entropy(logits[0], sequence["labels"][0], reduction="none")
        loss = (losses * sequence["loss_mask"][0]).sum() / count
        loss.backward()
        total += loss.item()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Result(losses=[total], loss_tokens=[int(count)], norms=[], tensors=found, extra=[])


def worst(left: Tensors, right: Tensors) -> tuple[float, str]:
    """Largest difference of an entry relative to its tensor's largest entry (floored at 1e-4 of all), and where."""
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    floor = 1e-4 * max(float(tensor.abs().max()) for tensor in right.values())
    return max(
        (float((left[name] - tensor).abs().max()) / max(floor, float(tensor.abs().max())), name)
        for name, tensor in right.items()
    )
