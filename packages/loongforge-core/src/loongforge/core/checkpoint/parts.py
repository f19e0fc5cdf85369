"""The components of this rank's model as a movement of weights sees them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from loongforge.core import plugins
from loongforge.core.checkpoint.contract import WeightPart
from loongforge.core.checkpoint.sources import Prefixes, composition_of, module_prefixes, spelled
from loongforge.core.lora.table import adapter_table, without_adapters
from loongforge.core.megatron.groups import World
from loongforge.core.model.weights import Rule, WeightTable
from loongforge.core.plan import Plan


def parts_of(
    plan: Plan, world: World, chunks: Sequence[Any], tower: Any, prefixes: Mapping[str, Prefixes] | None = None
) -> tuple[WeightPart, ...]:
    """All components, in the order data takes, with the names of a whole model; wrappers are taken off.

    `prefixes` are those of the run's composition when not given; a foundation alone keeps its own names.
    """
    model = plan.config.model
    composition = composition_of(model)
    if prefixes is None and composition is not None and composition.prefixes is not None:
        prefixes = composition.prefixes()(model)
    return tuple(
        part_of(plan, world, chunks, tower, component, (prefixes or {}).get(component))
        for component in model.components
    )


def part_of(
    plan: Plan, world: World, chunks: Sequence[Any], tower: Any, component: str, prefixes: Prefixes | None = None
) -> WeightPart:
    """One component, with its own Hugging Face names or those that `prefixes` make of them."""
    config = plan.config.model.components[component]
    foundation = component == "foundation"
    table: WeightTable = plugins.load("models", config.family).weights()(config.geometry)
    table = without_adapters(table)
    if foundation:
        modules: list[torch.nn.Module] = [unwrap(chunk) for chunk in chunks]
    else:
        modules = [] if tower is None else [unwrap(tower).get_submodule(component)]
    groups = world.groups if foundation else world.encoder_groups
    return WeightPart(
        component=component,
        chunks=modules,
        table=table if prefixes is None else renamed(table, prefixes),
        groups=groups if modules else None,
        vocab_size=plan.geometry.vocab_size if foundation else 0,
    )


def adapters_of(plan: Plan, world: World, chunks: Sequence[Any], tower: Any) -> tuple[WeightPart, ...]:
    """The adapters of every component that has some, with PEFT's names; on every rank of the same components."""
    prefixes = module_prefixes(plan.config.model)
    parts = (
        part_of(plan, world, chunks, tower, name, prefixes[name])
        for name in plan.config.model.components
        if plan.adapters_in(name)
    )
    return tuple(replace(part, table=adapter_table(part.table), vocab_size=0) for part in parts)


def unwrap(chunk: Any) -> torch.nn.Module:
    """The model inside megatron-core's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def renamed(table: WeightTable, prefixes: Prefixes) -> WeightTable:
    """The table with Hugging Face names as a whole model spells them.

    A rule whose tensors have no place in the whole is left out: its parameter is an error when weights move.
    """
    rules = [_renamed_rule(rule, prefixes) for rule in table.rules]
    ignored = [_renamed_pattern(pattern, prefixes) for pattern in table.ignored_hf]
    left_out = [replace(one, hf=_renamed_pattern(one.hf, prefixes)) for one in table.left_out_hf]
    return replace(
        table,
        rules=tuple(rule for rule in rules if rule is not None),
        ignored_hf=tuple(ignored),
        left_out_hf=tuple(left_out),
    )


def _renamed_rule(rule: Rule, prefixes: Prefixes) -> Rule | None:
    names: dict[str, str] = {}
    for field in fields(rule):
        value: Any = getattr(rule, field.name)
        if field.name == "megatron" or not isinstance(value, str):
            continue
        whole = spelled(value, prefixes)
        if whole is None:
            return None
        names[field.name] = whole
    return replace(rule, **names)  # pyright: ignore[reportArgumentType]


def _renamed_pattern(pattern: str, prefixes: Prefixes) -> str:
    """A regular expression of the component's names; one that begins with none of them may match anywhere."""
    spellings = [(begin, re.escape(whole)) for own, whole in prefixes for begin in dict.fromkeys((re.escape(own), own))]
    pair = next((pair for pair in spellings if pattern.startswith(pair[0])), None)
    if pair is None:
        return pattern
    return f"{pair[1]}(?:{pattern.removeprefix(pair[0])})"
