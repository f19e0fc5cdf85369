"""Give the linears of a built model their adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter

from loongforge.core.lora.layer import LowRank, Spread
from loongforge.core.lora.table import ADAPTER
from loongforge.core.lora.targets import Adapter
from loongforge.core.model.names import whole_model_name

_EXPERT = re.compile(r"(?<=local_experts\.)\d+")


def attach(
    chunks: Sequence[torch.nn.Module], adapters: Sequence[Adapter], groups: ProcessGroupCollection, seed: int
) -> None:
    """Put every adapter of this rank's layers in its place; the model's own parameters stop training."""
    wanted: dict[str, list[Adapter]] = {}
    for one in adapters:
        wanted.setdefault(one.matrix.linear, []).append(one)
    for chunk in chunks:
        chunk.requires_grad_(False)
        for name, _ in list(chunk.named_parameters()):
            place, _, last = name.rpartition(".")
            if last != "weight":
                continue
            linear, number = _of_any_expert(whole_model_name(chunk, name).rpartition(".")[0])
            if here := wanted.get(linear):
                _adapt(chunk.get_submodule(place), here, groups, number, seed)


def _of_any_expert(linear: str) -> tuple[str, int | None]:
    """The name with `{expert}` in place of the number of an expert, and that number."""
    found = _EXPERT.search(linear)
    return (linear, None) if found is None else (_EXPERT.sub("{expert}", linear), int(found[0]))


def _adapt(module: Any, adapters: Sequence[Adapter], groups: Any, expert: int | None, seed: int) -> None:
    group = groups.tp if expert is None else groups.expt_tp
    config = getattr(module, "config", None)
    sequence = groups.tp.size() > 1 and bool(getattr(module.weight, "sequence_parallel", False))
    if adapters[0].matrix.split != "whole":
        sequence = expert is None and group.size() > 1 and bool(getattr(config, "sequence_parallel", False))
    spread = Spread(group=group, sequence=sequence, expert=expert)
    module.add_module(ADAPTER, LowRank(adapters, module.weight, spread, seed))
    module.__class__ = _adapted(type(module))


@cache
def _adapted(kind: Any) -> type:
    """A class like `kind` that adds what the adapters say.

    The class of an instance is exchanged, as `torch.nn.utils.parametrize` does: which linear has an adapter is known by
    its name in the whole model, and that is known when the model is built.
    """

    def forward(self: Any, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        output, bias = kind.forward(self, input_, *args, **kwargs)
        return output + getattr(self, ADAPTER)(input_), bias

    def gating(self: Any, input: torch.Tensor) -> torch.Tensor:
        logits = kind.gating(self, input)
        return logits + getattr(self, ADAPTER)(input, logits.dtype)  # fp32, as the router computes

    def sharded_state_dict(self: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        # The linear describes all its parameters, the adapters' as if they were whole on every rank.
        own = kind.sharded_state_dict(self, prefix=prefix, sharded_offsets=sharded_offsets, metadata=metadata)
        return own | getattr(self, ADAPTER).sharded_state_dict(f"{prefix}{ADAPTER}.", sharded_offsets, metadata)

    if issubclass(kind, TopKRouter):
        return type(kind.__name__, (kind,), {"gating": gating})
    described = {"sharded_state_dict": sharded_state_dict} if hasattr(kind, "sharded_state_dict") else {}
    return type(kind.__name__, (kind,), {"forward": forward, **described})
