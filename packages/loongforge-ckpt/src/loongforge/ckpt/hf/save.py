"""Write the model as a Hugging Face directory, streaming: complete under its name, or not there at all."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loongforge.ckpt.hf.container import ContainerPart, create
from loongforge.ckpt.hf.directory import CONFIG, INDEX, SINGLE, foreign_entries, incomplete, travellers
from loongforge.ckpt.hf.parameters import Parameter, collect
from loongforge.ckpt.hf.publish import cannot_write, publish, sync, write_json
from loongforge.ckpt.hf.shards import (
    SHARD_BYTES,
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

    Every stage has files of its own, and so has every expert parallel rank for its experts. Ranks that share a file
    write their blocks at the same time, straight from the parameters to their places. An export that exists under the
    name is replaced when the new one is complete and on the disk. A failure leaves it as it was, removes what was
    begun, and raises the same `CheckpointError` on every rank.
    """
    start = time.perf_counter()
    world = move.world
    target = move.path.expanduser().resolve()
    plan = plan_files(_items(move), world, shard_bytes)
    work = incomplete(target)
    _together(world, _prepare(target, work, plan) if world.rank == 0 else [])
    try:
        written = 0
        for number in range(plan.rounds):
            # Meeting around every file keeps waiting ranks inside the timeout and stops all at the first failure.
            own = plan.mine.get(number)
            _together(world, _create(work, own) if own else [])
            count, problems = _fill(work, own) if own else (0, [])
            written += count
            _together(world, problems)
        total = sum(world.gather(written))
        assert total == plan.bytes, f"ranks hold {total} of the {plan.bytes} bytes of the export"
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


def _create(work: Path, own: OwnFile) -> list[str]:
    """A file of a team by its first rank, without its tensors; returns what went wrong."""
    try:
        if own.items[0].group.rank() == 0:
            create(work / own.name, own.entries)
    except OSError as error:
        return [cannot_write(work / own.name, error)]
    return []


@torch.no_grad()
def _fill(work: Path, own: OwnFile) -> tuple[int, list[str]]:
    """Everything that this rank alone holds of a file, straight to its place; bytes, and what went wrong."""
    part = ContainerPart(work / own.name, own.entries)
    try:
        with part:
            for item in own.items:
                for parameter in item.parameters:
                    _write(part, item, parameter)
    except OSError as error:
        return part.written, [cannot_write(work / own.name, error)]
    return part.written, []


def _write(part: ContainerPart, item: Item, parameter: Parameter) -> None:
    if parameter.shard.rank and parameter.is_whole:
        return  # another rank of the team has the same
    blocks, copies = parameter.pieces(), parameter.copies()
    for entry in item.entries:
        for piece in blocks[copies.get(entry.name, entry.name)]:
            part.write(entry.name, piece.block, piece.as_hf(parameter.tensor))


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
