"""Adapters between a run and PEFT's directory."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from loongforge.ckpt.hf.container import ContainerWriter, Entry
from loongforge.ckpt.hf.directory import incomplete
from loongforge.ckpt.hf.load import load as load_tensors
from loongforge.ckpt.hf.parameters import Parameter, collect
from loongforge.ckpt.hf.publish import cannot_write, publish, sync, write_json
from loongforge.ckpt.peft.config import CONFIG, WEIGHTS, written
from loongforge.core.checkpoint.contract import MoveReport, WeightMove
from loongforge.core.errors import CheckpointError
from loongforge.core.model.weights import Copy

OWN = {CONFIG, WEIGHTS, "README.md"}
"""Names that an export of adapters may replace."""


def locate(path: Path) -> tuple[dict[str, str], list[str]]:
    """Where the tensors are: all in one file."""
    if (path / WEIGHTS).is_file():
        return {"*": WEIGHTS}, []
    if (path / "adapter_model.bin").is_file():
        return {}, [
            f"{path}: holds only pickled adapters (adapter_model.bin), which can run code and are never read. Convert "
            f"them once in a place you trust: PEFT's save_pretrained(...) writes {WEIGHTS}."
        ]
    return {}, [f"{path}: no {WEIGHTS} with the adapters. Download it again."]


def load(move: WeightMove) -> MoveReport:
    """Fill every adapter; the directory must hold exactly those that the model has. Collective."""
    return load_tensors(move, locate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part of one tensor."""

    name: str
    shape: tuple[int, ...]
    dim: int
    begin: int
    values: torch.Tensor


def save(move: WeightMove) -> MoveReport:
    """Write the adapters so that the directory appears complete, or not at all. Collective.

    Every rank sends what it alone holds to rank 0, which has all adapters in memory then: they are small.
    """
    assert move.adapters is not None, "an export of adapters says what they are"
    start, world, target = time.perf_counter(), move.world, move.path.expanduser().resolve()
    blocks = [block for part in move.parts for one in collect(part)[0] for block in _blocks(one, move.dtype)]
    gathered: list[Any] | None = [None] * world.size if world.is_main else None
    if world.size == 1:
        gathered = [blocks]
    else:
        dist.gather_object(blocks, gathered, dst=0, group=world.control)
    tensors = _together(block for some in gathered or [] for block in some)
    problems = _write(target, tensors, written(move.adapters)) if world.is_main else []
    if found := world.agree(problems):
        raise CheckpointError("\n".join(found))
    count, size = world.gather((len(tensors), sum(tensor.nbytes for tensor in tensors.values())))[0]
    return MoveReport(tensors=count, bytes=size, seconds=time.perf_counter() - start)


def _blocks(parameter: Parameter, dtype: torch.dtype | None) -> list[Block]:
    """What this rank alone holds of an adapter; nothing where another one holds the same."""
    shard = parameter.shard
    whole = isinstance(parameter.rule, Copy) and parameter.rule.shard_dim is None
    if shard.copy or (shard.rank and whole):
        return []
    ((name, shape),) = parameter.hf_shapes().items()
    return [
        Block(
            name=name,
            shape=shape,
            dim=piece.dim,
            begin=piece.hf_at,
            values=piece.of_parameter(parameter.tensor).to("cpu", dtype or parameter.tensor.dtype).contiguous(),
        )
        for piece in parameter.pieces()[name]
    ]


def _together(blocks: Any) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for block in blocks:
        whole = tensors.setdefault(block.name, torch.full(block.shape, torch.nan, dtype=block.values.dtype))
        whole.narrow(block.dim, block.begin, block.values.size(block.dim)).copy_(block.values)
    return dict(sorted(tensors.items()))


def _write(target: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> list[str]:
    work = incomplete(target)
    try:
        if target.is_dir() and (foreign := sorted({entry.name for entry in target.iterdir()} - OWN)):
            return [
                f"{target}: holds {foreign[0]!r}, which no export of adapters writes and replacing the directory would "
                "delete. Move it away or choose another directory for the export."
            ]
        if target.exists() and not target.is_dir():
            return [f"{target}: exists and is not a directory. Choose another directory for the export."]
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        entries = [Entry(name=name, dtype=one.dtype, shape=tuple(one.shape)) for name, one in tensors.items()]
        with ContainerWriter(work / WEIGHTS, entries) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        write_json(work / CONFIG, config)
        sync(work)
        publish(work, target)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        return [cannot_write(target, error)]
    return []
