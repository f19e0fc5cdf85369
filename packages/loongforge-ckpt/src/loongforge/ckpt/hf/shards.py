"""Which Hugging Face tensor goes into which file, decided by every rank alike before a byte is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from loongforge.ckpt.hf.container import TYPES, Entry
from loongforge.ckpt.hf.directory import SINGLE
from loongforge.ckpt.hf.parameters import Parameter
from loongforge.core.checkpoint.contract import WeightPart

if TYPE_CHECKING:
    from loongforge.core.megatron.groups import World

SHARD_BYTES = 5 * 10**9
"""Largest file of an export, unless one tensor alone is larger; as transformers writes."""

DENSE, EXPERT, STACKED = range(3)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Team:
    """Ranks that put their parts of the same parameters together and write files of their own.

    Of one component and kind every rank is in one team at most: all teams of a kind write at the same time.
    """

    part: int
    """Number of the component in the movement."""
    kind: int
    """`DENSE`; `EXPERT`: every expert parallel rank has its own files; `STACKED`: all of a stage share tensors."""
    stage: int
    """Pipeline stage."""
    expert_rank: int
    """Of the kind `EXPERT`, else 0."""


Place = tuple[Team, int]
"""A team, and the number of an item in it."""
Named = dict[Team, list[tuple[Entry, ...]]]
"""What the items of every team become."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One parameter, or all experts of a stacked tensor that this rank holds."""

    team: Team
    group: dist.ProcessGroup
    """The team; its first rank creates the files."""
    parameters: tuple[Parameter, ...]
    entries: tuple[Entry, ...]
    """The tensors it becomes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnFile:
    """One file of a team of this rank."""

    name: str
    items: tuple[Item, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Its tensors in their order."""
        return tuple(entry for item in self.items for entry in item.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """The files of an export and what this rank's teams put into their own."""

    mine: Mapping[int, OwnFile]
    """By round: on one rank files are written one after the other, on all ranks at the same time."""
    files: dict[str, str]
    """File of every tensor, over all teams."""
    bytes: int
    """Size of all tensors."""
    dtype: torch.dtype
    """Type of most of the bytes."""
    rounds: int


def items_of(
    number: int, part: WeightPart, parameters: Sequence[Parameter], dtype: torch.dtype | None
) -> tuple[list[Item], list[str]]:
    """What this rank's first copies become, in model order; and problems of parameters that cannot be written."""
    together: dict[tuple[str, ...], list[Parameter]] = {}
    for one in parameters:
        together.setdefault(one.hf_names() if one.is_stacked else (one.name, ""), []).append(one)
    items: list[Item] = []
    problems: list[str] = []
    groups: Any = part.groups
    for found in together.values():
        first = found[0]
        try:
            entries = entries_of(first, dtype)
        except ValueError as error:
            problems.append(f"parameter {first.name!r} does not fit its rule: {error}.")
            continue
        if first.shard.copy:
            continue
        if first.is_stacked:
            kind, group, expert_rank = STACKED, groups.tp_ep, 0
        elif first.is_expert:
            kind, group, expert_rank = EXPERT, groups.expt_tp, groups.ep.rank()
        else:
            kind, group, expert_rank = DENSE, groups.tp, 0
        team = Team(part=number, kind=kind, stage=groups.pp.rank(), expert_rank=expert_rank)
        ordered = tuple(sorted(found, key=lambda one: one.shard.expert))
        items.append(Item(team=team, group=group, parameters=ordered, entries=entries))
    return items, problems


def entries_of(parameter: Parameter, dtype: torch.dtype | None) -> tuple[Entry, ...]:
    """Tensors that a parameter becomes; `ValueError` when it does not fit its rule or its type cannot be written."""
    kind = dtype if dtype is not None and parameter.tensor.is_floating_point() else parameter.tensor.dtype
    if kind not in TYPES:
        raise ValueError(f"type {kind} cannot be written, one of {', '.join(map(str, TYPES))} is needed")
    shapes = parameter.hf_shapes()
    shapes |= {name: shapes[original] for name, original in parameter.copies().items()}
    return tuple(Entry(name=name, dtype=kind, shape=shape) for name, shape in shapes.items())


def plan_files(items: Sequence[Item], world: World, shard_bytes: int) -> ExportPlan:
    """Agree with all ranks on the files. Collective. What two parameters hold (tied) the earlier one writes."""
    here: dict[Team, list[Item]] = {}
    for item in items:
        here.setdefault(item.team, []).append(item)
    first: Named = {
        team: [item.entries for item in items] for team, items in here.items() if items[0].group.rank() == 0
    }
    named = dict(sorted((team, entries) for told in world.gather(first) for team, entries in told.items()))
    owner: dict[str, Place] = {}
    for team, contents in named.items():
        for index, entries in enumerate(contents):
            for entry in entries:
                owner.setdefault(entry.name, (team, index))
    cut = {team: _cut(_sizes(team, contents, owner), shard_bytes) for team, contents in named.items()}
    total = sum(len(parts) for parts in cut.values())
    starts, rounds = _rounds(cut)
    files: dict[str, str] = {}
    mine: dict[int, OwnFile] = {}
    number = 0
    for team, parts in cut.items():
        for place, part in enumerate(parts):
            number += 1
            file = SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
            for index in part:
                files |= {one.name: file for one in named[team][index] if owner[one.name] == (team, index)}
            if team in here:
                kept = [_without_others(here[team][index], owner, (team, index)) for index in part]
                # Wide types first: every tensor of a file of mixed types begins at a multiple of its own width.
                kept.sort(key=lambda item: -item.entries[0].dtype.itemsize)
                mine[starts[team] + place] = OwnFile(name=file, items=tuple(kept))
    entries = {one.name: one for contents in named.values() for entries in contents for one in entries}.values()
    return ExportPlan(
        mine=mine,
        files=files,
        bytes=sum(entry.bytes for entry in entries),
        dtype=_usual_type(entries),
        rounds=rounds,
    )


def expected_free(path: Path, needed: int, free: int) -> list[str]:
    """The problem, if the file system of an export cannot hold it."""
    if needed <= free:
        return []
    return [f"{path}: the export needs {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free. Nothing was written."]


def _rounds(cut: Mapping[Team, Sequence[Any]]) -> tuple[dict[Team, int], int]:
    """First round of every team, and the number of all: a rank may be in teams of several components and kinds."""
    starts: dict[Team, int] = {}
    begin, longest, lane = 0, 0, None
    for team, parts in cut.items():
        if (team.part, team.kind) != lane:
            begin, longest, lane = begin + longest, 0, (team.part, team.kind)
        starts[team] = begin
        longest = max(longest, len(parts))
    return starts, begin + longest


def _sizes(team: Team, contents: Sequence[tuple[Entry, ...]], owner: Mapping[str, Place]) -> list[int]:
    """Bytes that each item of a team writes itself."""
    return [
        sum(entry.bytes for entry in entries if owner[entry.name] == (team, index))
        for index, entries in enumerate(contents)
    ]


def _usual_type(entries: Iterable[Entry]) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for entry in entries:
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.bytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _cut(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices in order, filled up to `limit` bytes a part; what has no bytes of its own is left out."""
    parts: list[list[int]] = []
    filled = 0
    for index, size in enumerate(sizes):
        if size == 0:
            continue
        if not parts or filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(index)
        filled += size
    return parts


def _without_others(item: Item, owner: Mapping[str, Place], place: Place) -> Item:
    """The item with those tensors alone that no earlier parameter writes."""
    return replace(item, entries=tuple(entry for entry in item.entries if owner[entry.name] == place))
