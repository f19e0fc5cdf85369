"""Both sides' results put together and compared."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from loongforge.ckpt.verify.batch import rows_of
from loongforge.ckpt.verify.reference import GRADIENTS, RESULT
from loongforge.core.megatron.context_parallel import local_indices
from loongforge.core.plan import Plan

Tensors = dict[str, torch.Tensor]

FLOOR = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one side computed."""

    loss: float
    logits: torch.Tensor
    """fp32 `[sequences, seq_length, vocabulary]`."""
    gradients: Tensors
    """By Hugging Face name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far two tensors are apart."""

    name: str
    worst: float
    """Largest difference of an entry, relative to the largest entry of transformers' tensor.

    A gradient below `FLOOR` of the model's largest one is measured on that scale: beneath it is rounding alone."""
    absolute: float
    """Largest difference of an entry."""


def ours(plan: Plan, scratch: Path) -> Side:
    """Put together what the workers wrote."""
    layout, length = plan.layout, plan.seq_length
    logits = torch.full((plan.global_batch_size, length, plan.padded_vocab_size), torch.nan)
    columns = plan.padded_vocab_size // layout.tp
    for dp in range(layout.dp):
        rows = torch.cat([torch.arange(plan.global_batch_size)[part] for part in rows_of(plan, dp)])
        for cp in range(layout.cp):
            positions = local_indices((0, length), cp, layout.cp)
            for tp in range(layout.tp):
                block = load_file(scratch / f"logits-{dp}-{cp}-{tp}.safetensors")["logits"]
                logits[rows[:, None], positions, tp * columns : (tp + 1) * columns] = block
    loss = json.loads((scratch / "loss.json").read_text())["loss"]
    return Side(loss=loss, logits=logits[..., : plan.geometry.vocab_size], gradients=_read(scratch / "gradients"))


def theirs(scratch: Path) -> Side:
    """What transformers left."""
    result = load_file(scratch / RESULT)
    return Side(loss=result["loss"].item(), logits=result["logits"], gradients=_read(scratch / GRADIENTS))


def differences(left: Side, right: Side) -> list[Difference]:
    """Logits, loss and every gradient, worst first; a gradient that one side lacks is infinitely far."""
    found = [
        _difference("logits", left.logits, right.logits),
        _difference("loss", torch.tensor(left.loss), torch.tensor(right.loss)),
    ]
    floor = FLOOR * max((float(gradient.abs().max()) for gradient in right.gradients.values()), default=0.0)
    for name in sorted(left.gradients.keys() | right.gradients.keys()):
        if name in left.gradients and name in right.gradients:
            found.append(_difference(f"grad {name}", left.gradients[name], right.gradients[name], floor))
        else:
            found.append(Difference(name=f"grad {name}", worst=torch.inf, absolute=torch.inf))
    return sorted(found, key=lambda one: -one.worst)


def _difference(name: str, left: torch.Tensor, right: torch.Tensor, floor: float = 0.0) -> Difference:
    absolute = float((left.double() - right.double()).abs().max())
    largest = max(floor, float(right.double().abs().max()))
    if math.isnan(absolute):
        return Difference(name=name, worst=torch.inf, absolute=torch.inf)
    worst = absolute / largest if largest else (torch.inf if absolute else 0.0)
    return Difference(name=name, worst=worst, absolute=absolute)


def _read(path: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(file).items()}
    assert tensors, f"{path} is the export of a worker"
    return tensors
