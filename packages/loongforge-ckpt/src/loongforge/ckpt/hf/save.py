"""Write the model as a Hugging Face directory, streaming: complete under its name, or not there at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from loongforge.ckpt.hf.container import ContainerWriter
from loongforge.ckpt.hf.directory import CONFIG, INDEX, SINGLE, foreign_entries, incomplete, travellers
from loongforge.ckpt.hf.parameters import collect
from loongforge.ckpt.hf.publish import cannot_write, publish, sync, write_json
from loongforge.ckpt.hf.shards import (
    SHARD_BYTES,
    STACKED,
    ExportPlan,
    Item,
    OwnFile,
    expected_free,
    items_of,
    plan_files,
)
from loongforge.core.checkpoint.contract import MoveReport, WeightMove
from loongforge.core.errors import CheckpointError

if TYPE_CHECKING:
    from loongforge.core.megatron.groups import World


def save(move: WeightMove, shard_bytes: int = SHARD_BYTES) -> MoveReport:
    """Write all weights, `config.json`, the index and what travels along. Collective.

    The first tensor parallel rank of every stage writes that stage's files, holding one parameter at a time; every
    expert parallel rank writes its own experts. An export that exists under the name is replaced when the new one is
    complete and on the disk. A failure leaves it as it was, removes what was begun, and raises the same
    `CheckpointError` on every rank.
    """
    start = time.perf_counter()
    world = move.world
    target = move.path.expanduser().resolve()
    plan = plan_files(_items(move), world, shard_bytes)
    work = incomplete(target)
    _together(world, _prepare(target, work, plan) if world.rank == 0 else [])
    try:
        for number in range(plan.rounds):
            # Meeting after every file keeps waiting ranks inside the timeout and stops all at the first failure.
            own = plan.mine.get(number)
            _together(world, _write_file(work, own, plan, world) if own else [])
        _together(world, _finish(move, target, work, plan) if world.rank == 0 else [])
    except CheckpointError:
        if world.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        world.barrier()
        raise
    return MoveReport(tensors=len(plan.files), bytes=plan.bytes, seconds=time.perf_counter() - start)


def _together(world: World, problems: list[str]) -> None:
    if found := world.agree(problems):
        raise CheckpointError("\n".join(found))


def _items(move: WeightMove) -> list[Item]:
    items: list[Item] = []
    problems: list[str] = []
    for number, part in enumerate(move.parts):
        parameters, orphans = collect(part)
        problems += [f"parameter {name!r}: no rule in the weight table says what it becomes." for name in orphans]
        found, unfit = items_of(number, part, parameters, move.dtype)
        items, problems = items + found, problems + unfit
    _together(move.world, problems)
    return items


def _prepare(target: Path, work: Path, plan: ExportPlan) -> list[str]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            if not target.is_dir():
                return [f"{target}: exists and is not a directory. Choose another directory for the export."]
            if foreign := foreign_entries(target):
                return [
                    f"{target}: holds {foreign[0]!r}, which no export writes and replacing the directory would delete. "
                    "Move it away or choose another directory for the export."
                ]
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        if problems := expected_free(target, plan.bytes, shutil.disk_usage(work).free):
            work.rmdir()
        return problems
    except OSError as error:
        return [cannot_write(target, error)]


def _write_file(work: Path, own: OwnFile, plan: ExportPlan, world: World) -> list[str]:
    """One file of a team; returns what went wrong. Ranks besides the first one only send their part."""
    stream = _tensors(own.items, plan, world)
    try:
        if own.items[0].group.rank() == 0:
            with ContainerWriter(work / own.name, [entry for item in own.items for entry in item.entries]) as writer:
                for name, tensor in stream:
                    writer.write(name, tensor)
        problems = []
    except OSError as error:
        problems = [cannot_write(work / own.name, error)]
    for _ in stream:
        pass  # a sending rank, or a failed one: the others are in the same collectives
    return problems


def _tensors(items: Sequence[Item], plan: ExportPlan, world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face tensors on the CPU, one by one, on the first rank of the team; nothing on the others.

    Stacked experts come expert by expert: rows of one tensor.
    """
    for item in items:
        if item.team.kind == STACKED:
            yield from _stacked(item, plan.holders[item.team], world)
        elif parts := _gather(item):
            yield from _assembled(item, parts)


@torch.no_grad()
def _gather(item: Item) -> list[torch.Tensor]:
    """The parameter's parts of all ranks of the team, on the first one; nothing on the others."""
    mine = item.parameters[0].tensor.to(item.entries[0].dtype).contiguous()
    size = item.group.size()
    if size == 1:
        return [mine]
    raw = mine.reshape(-1).view(torch.uint8)  # bytes: every backend moves them, whatever the type
    parts = [torch.empty_like(raw) for _ in range(size)] if item.group.rank() == 0 else None
    dist.gather(raw, parts, group=item.group, group_dst=0)
    return [part.view(mine.dtype).view(mine.shape) for part in parts or []]


def _assembled(item: Item, parts: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    blocks = [item.parameters[0].pieces(rank) for rank in range(len(parts))]
    copies = item.parameters[0].copies()
    for entry in item.entries:
        original = copies.get(entry.name, entry.name)
        first = blocks[0][original]
        if first and first[0].length == entry.shape[first[0].dim] and tuple(parts[0].shape) == entry.shape:
            yield entry.name, parts[0].cpu()  # one rank holds all of it
            continue
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        for part, named in zip(parts, blocks, strict=True):
            for piece in named[original]:
                piece.of_hf(tensor).copy_(piece.of_parameter(part))
        yield entry.name, tensor


@torch.no_grad()
def _stacked(item: Item, holders: Mapping[int, tuple[int, ...]], world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """Expert by expert on the first rank of the team, wherever it lies; one expert is in memory at a time."""
    (entry,), any_expert = item.entries, item.parameters[0]
    own = {one.shard.expert: one.tensor for one in item.parameters}
    writer = dist.get_global_rank(item.group, 0)
    for expert, ranks in holders.items():
        block = torch.empty((1, *entry.shape[1:]), dtype=entry.dtype) if world.rank == writer else None
        for number, rank in enumerate(ranks):
            if rank == world.rank:
                part = own[expert].to(entry.dtype).contiguous()
                if block is None:
                    dist.send(part.reshape(-1).view(torch.uint8), writer, group=item.group)
            elif block is not None:
                part = torch.empty_like(any_expert.tensor, dtype=entry.dtype).contiguous()
                dist.recv(part.reshape(-1).view(torch.uint8), rank, group=item.group)
            else:
                continue
            for piece in any_expert.pieces(number)[entry.name] if block is not None else ():
                replace(piece, index=0).of_hf(block).copy_(piece.of_parameter(part))
        if block is not None:
            yield entry.name, block


def _finish(move: WeightMove, target: Path, work: Path, plan: ExportPlan) -> list[str]:
    """Everything beside the weights, then the name."""
    try:
        config = dict(move.config)
        if not {"dtype", "torch_dtype"} & set(config):
            config["torch_dtype"] = str(plan.dtype if move.dtype is None else move.dtype).removeprefix("torch.")
        write_json(work / CONFIG, config)
        if SINGLE not in plan.files.values():
            where = dict(sorted(plan.files.items()))
            write_json(work / INDEX, {"metadata": {"total_size": plan.bytes}, "weight_map": where})
        for file in travellers(move.travel) if move.travel is not None else ():
            shutil.copyfile(file, work / file.name)
            sync(work / file.name)
        sync(work)
        publish(work, target)
    except OSError as error:
        return [cannot_write(target, error)]
    return []
