"""Random weights that every process makes alike: a tensor follows from its name in a checkpoint and a seed.

So that no side reads 16 GB from a disk, and none knows another's layout: those that train Megatron's parameters fill
them through the family's weight table, transformers' are the tensors themselves.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loongforge.ckpt.hf.parameters import collect
from loongforge.core.checkpoint.contract import WeightPart
from loongforge.core.model.weights import WeightTable

LAST_NORM = "model.norm.weight"
DISTURBANCE = 1.25
"""Factor of the last norm's weight on a side that is to be found out."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The tensors of a checkpoint that nobody has written."""

    seed: int
    device: torch.device
    disturbed: bool = False

    def tensor(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """fp32 on the device. Norms are near 1, matrices keep the size of what goes through them, embeddings are
        small: tied ones make the logits too."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()) ^ self.seed)
        numbers = torch.randn(tuple(shape), generator=generator, device=self.device)
        if name.endswith("norm.weight"):
            numbers = 1 + 0.1 * numbers
        elif "embed" in name or name.startswith("lm_head"):
            numbers *= 0.02
        else:
            numbers *= 0.7 * shape[-1] ** -0.5
        return DISTURBANCE * numbers if self.disturbed and name == LAST_NORM else numbers


@torch.no_grad()
def fill(part: WeightPart, drawn: Drawn) -> None:
    """Set every parameter of Megatron's modules as loading a checkpoint would."""
    parameters, orphans = collect(part)
    assert not orphans, f"no rule in the weight table names {orphans[0]}"
    for parameter in parameters:
        shapes = parameter.hf_shapes()
        for name, pieces in parameter.pieces().items():
            tensor = drawn.tensor(name, shapes[name])
            for piece in pieces:
                piece.of_parameter(parameter.tensor).copy_(piece.of_hf(tensor))


@torch.no_grad()
def fill_transformers(model: Any, drawn: Drawn) -> None:
    """Set every parameter of a model of transformers, which keeps experts in two tensors for each layer."""
    for name, parameter in model.named_parameters():
        stem, _, last = name.rpartition(".")
        if not stem.endswith("experts"):
            parameter.copy_(drawn.tensor(name, parameter.shape))
            continue
        for number, expert in enumerate(parameter):
            if last == "down_proj":
                expert.copy_(drawn.tensor(f"{stem}.{number}.down_proj.weight", expert.shape))
                continue
            assert last == "gate_up_proj", f"{name} is neither of an expert's two tensors"
            for kind, half in zip(("gate", "up"), expert.chunk(2), strict=True):
                half.copy_(drawn.tensor(f"{stem}.{number}.{kind}_proj.weight", half.shape))


def with_grouped_names(table: WeightTable) -> WeightTable:
    """The table and the names under which TransformerEngine groups experts, a number behind the parameter's name."""
    own = ".local_experts.{expert}."
    grouped = [
        replace(rule, megatron=rule.megatron.replace(own, ".") + "{expert}")
        for rule in table.rules
        if own in rule.megatron
    ]
    return replace(table, rules=(*table.rules, *grouped))
