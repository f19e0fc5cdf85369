"""What trains: parameters of the whole model by part, counted once however they are spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loongforge.core.megatron.groups import World

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a component."""

    component: str
    part: str
    """`embedding`, `decoder.layers`, `decoder.final_layernorm`, `output_layer`; `lora` for all adapters together,
    `indexer` for what chooses keys in all layers."""
    trained: int
    """Parameters that train."""
    total: int
    """Parameters in all, rows that pad the vocabulary included."""


def count_parts(
    component: str,
    names: Mapping[str, torch.nn.Parameter],
    groups: ProcessGroupCollection | None,
    world: World,
) -> tuple[Part, ...]:
    """Parts of a component in their order, from every rank's parameters by whole-model name. Collective.

    Each parameter counts on one copy of the component's grid; one that tensor parallelism does not split, on one of its
    ranks; the last stage's copy of a tied embedding not at all. `groups` are the component's, None without a part.
    """
    here: dict[str, tuple[int, int]] = {}
    for name, parameter in names.items() if groups is not None else ():
        assert groups is not None, "the loop is empty otherwise"
        split = getattr(parameter, "tensor_model_parallel", False)
        copied = getattr(parameter, "shared", False)
        if getattr(parameter, "allreduce", True):
            counts = groups.dp_cp.rank() == 0 and (split or groups.tp.rank() == 0) and not copied
        else:  # an expert's: other ranks hold other experts
            counts = groups.expt_dp.rank() == 0 and (split or groups.expt_tp.rank() == 0)
        trained, total = here.get(_part(name), (0, 0))
        size = parameter.numel() if counts else 0
        here[_part(name)] = (trained + size * parameter.requires_grad, total + size)
    sums: dict[str, tuple[int, int]] = {}
    for found in world.gather(here):
        for part, (trained, total) in found.items():
            before = sums.get(part, (0, 0))
            sums[part] = (before[0] + trained, before[1] + total)
    return tuple(
        Part(component=component, part=part, trained=trained, total=total) for part, (trained, total) in sums.items()
    )


def table(parts: tuple[Part, ...]) -> list[str]:
    """Lines of a table, a row for each part and one for their sum."""
    whole = Part(
        component="all", part="", trained=sum(one.trained for one in parts), total=sum(one.total for one in parts)
    )
    rows = [(f"{one.component} {one.part}".strip(), f"{one.trained:,}", f"{one.total:,}") for one in (*parts, whole)]
    heading = ("Component", "trains", "of")
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(3)]
    return [
        f"{name:<{widths[0]}}  {trained:>{widths[1]}}  {total:>{widths[2]}}"
        for name, trained, total in (heading, *rows)
    ]


def is_indexer(name: str) -> bool:
    """Whether a parameter belongs to what chooses keys for sparse attention."""
    return ".indexer." in name


def _part(name: str) -> str:
    if ".lora." in name:
        return "lora"
    if is_indexer(name):
        return "indexer"
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "decoder" else first
