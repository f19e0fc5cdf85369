"""Load what `find_start` found."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from loongforge.core import plugins
from loongforge.core.checkpoint import random_state
from loongforge.core.checkpoint.contract import WeightMove, WeightPart
from loongforge.core.checkpoint.parts import adapters_of, part_of
from loongforge.core.checkpoint.safe_metadata import UnsafeCheckpoint, read_metadata, refuse_code
from loongforge.core.checkpoint.sources import Source, sources
from loongforge.core.checkpoint.start import Start
from loongforge.core.checkpoint.state import (
    layout_facts,
    lora_facts,
    model_state,
    random_object,
    restore_model,
    restore_training,
    training_state,
)
from loongforge.core.config.loaded import adapter_format
from loongforge.core.errors import CheckpointError
from loongforge.core.megatron.groups import World
from loongforge.core.model.build import Model
from loongforge.core.plan import Plan
from loongforge.core.step.optimizer import Training


def load_weights(plan: Plan, world: World, model: Model, start: Start) -> list[str]:
    """Fill a fresh model from foreign formats, before it is wrapped; sentences about components that did not come from
    `--load`. Collective; `CheckpointError` on every rank.

    Components of one directory are read together. Those that no directory holds keep the numbers they were built with.
    """
    found = sources(plan.config.model, start)
    together: dict[Path, list[str]] = {}
    notes: list[str] = []
    for name, source in found.items():
        if source is not None:
            together.setdefault(source.path, []).append(name)
    for path, names in together.items():
        first = found[names[0]]
        assert first is not None, "it has a path"
        parts: list[WeightPart] = []
        for name in names:
            source = found[name]
            prefixes = source.prefixes if source else None
            parts.append(part_of(plan, world, model.chunks, model.tower, name, prefixes))
        spec: plugins.FormatSpec = plugins.load("checkpoints", first.format)
        whole = first.others <= set(names)
        notes += spec.load()(WeightMove(path=path, parts=tuple(parts), world=world, config={}, whole=whole)).notes
    return [*_origins(found, start), *notes, *_load_adapters(plan, world, model, start)]


def _load_adapters(plan: Plan, world: World, model: Model, start: Start) -> list[str]:
    """Fill the adapters from the directory that the run names, unless a checkpoint of ours holds them."""
    named = plan.config.lora.adapter_path
    if not plan.adapters or named is None or _has_adapters(start):
        return []
    path = Path(named).expanduser()
    spec: plugins.FormatSpec = adapter_format(path).spec
    move = WeightMove(path=path, parts=adapters_of(plan, world, model.chunks, model.tower), world=world, config={})
    return [f"Adapters of {path}.", *spec.load()(move).notes]


def _has_adapters(start: Start) -> bool:
    return start.manifest is not None and bool(start.manifest.lora)


def _origins(found: Mapping[str, Source | None], start: Start) -> list[str]:
    """What `Start` does not say: nothing, when it holds for all components."""
    notes: list[str] = []
    for name, source in found.items():
        if source is None and len(found) > 1:
            notes.append(f"{name}: freshly initialised.")
        elif source is not None and start.weights not in (source.path, source.path.parent):
            notes.append(f"{name}: {source.format} weights of {source.path}.")
    if start.is_fresh and all(source is None for source in found.values()):
        return []  # the beginning says so
    return notes


def load_training(plan: Plan, world: World, training: Training, start: Start) -> list[str]:
    """Restore a checkpoint of ours into a built run; returns sentences about what was not restored.

    Raises `CheckpointError` when files are damaged or do not fit the model.
    """
    if start.checkpoint is None or start.manifest is None:
        return []
    verify_files(start.checkpoint, world)
    section, manifest = plan.config.checkpoint, start.manifest
    _same_kind_of_optimizer(plan, start)
    _same_adapters(plan, start)
    whole = not start.weights_only
    optimizer = whole and manifest.optimizer and (start.continued or not section.no_load_optim)
    same_world = dict(manifest.layout) == layout_facts(plan)
    wants_random = whole and (start.continued or not section.no_load_rng)
    random = wants_random and same_world
    state = (
        model_state(world, training.chunks, training.tower, adapters=_has_adapters(start))
        if start.weights_only
        else training_state(training, world, optimizer=optimizer, loading=True)
    )
    if random:
        state["random"] = random_object(world)
    loaded = _load(state, start.checkpoint, world)
    restore_training(training, loaded, optimizer=optimizer, schedule=whole)
    if random:
        random_state.restore(loaded["random"], world)
    notes: list[str] = []
    if not optimizer and whole:
        notes.append("The optimizer state was not loaded: its moments start at zero.")
    if wants_random and not random:
        notes.append(
            f"Layout {_short(manifest.layout)} -> {_short(layout_facts(plan))}: "
            "random states start anew; weights and data do not."
        )
    return notes


def _same_kind_of_optimizer(plan: Plan, start: Start) -> None:
    manifest, section = start.manifest, plan.config.checkpoint
    if manifest is None or not manifest.optimizer or start.weights_only:
        return
    if section.no_load_optim and not start.continued:
        return
    if manifest.format < 2:
        raise CheckpointError(
            f"{start.checkpoint} was saved by an earlier version, whose optimizer state has another form: start its "
            "moments anew with --no-load-optim."
        )
    if manifest.precision != (asked := plan.config.train.precision):
        raise CheckpointError(
            f"{start.checkpoint} was trained in {manifest.precision} and this run is {asked}, whose optimizer holds "
            f"other numbers: use --{manifest.precision}, or take the weights alone with --finetune and another --save, "
            f"or start the moments anew with --no-load-optim --load {start.checkpoint}."
        )
    now = plan.config.parallel.use_distributed_optimizer
    if manifest.distributed_optimizer != now:
        flag = "drop --use-distributed-optimizer" if now else "add --use-distributed-optimizer"
        raise CheckpointError(
            f"{start.checkpoint} was saved {'with' if manifest.distributed_optimizer else 'without'} the distributed "
            f"optimizer, whose state has other names: {flag}, or start its moments anew with --no-load-optim."
        )


def _same_adapters(plan: Plan, start: Start) -> None:
    """The same rank, scale and modules as were saved: shapes would tell of some differences, and of alpha none."""
    manifest, now = start.manifest, lora_facts(plan)
    assert manifest is not None, "asked of a checkpoint of ours"
    if dict(manifest.lora) == now:
        return
    if not manifest.lora and start.weights_only:
        return  # adapters begin on a model that was trained before
    if not now:
        raise CheckpointError(
            f"{start.checkpoint} holds adapters, and this run has none: give --lora-rank {manifest.lora.get('rank')} "
            "and the other numbers of its config.yaml, or merge them into the model with loongforge merge-adapter."
        )
    if not manifest.lora:
        raise CheckpointError(
            f"{start.checkpoint} was trained without adapters: begin with it with --finetune and another --save."
        )
    changed = [name for name in now if manifest.lora.get(name) != now[name]]
    lines = "; ".join(f"lora.{name} was {manifest.lora.get(name)!r}, is {now[name]!r}" for name in changed)
    raise CheckpointError(f"{start.checkpoint}: {lines}. Adapters mean something with their own numbers alone.")


def load_model(world: World, model: Model, checkpoint: Path) -> None:
    """Only the weights of a checkpoint of ours, adapters included, into a model that is not wrapped."""
    verify_files(checkpoint, world)
    loaded = _load(model_state(world, model.chunks, model.tower), checkpoint, world)
    restore_model(model.chunks, model.tower, loaded)


def verify_files(checkpoint: Path, world: World) -> None:
    """Hash every file and compare with what was written, then refuse what would run code when it is read.

    The ranks share the files among them. Raises `CheckpointError` on all ranks, with every problem found.
    """
    problems: list[str] = []
    try:
        problems += _changed_files(checkpoint, world)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        problems.append(f"{INTEGRITY_FNAME} cannot be read: {type(error).__name__}: {error}")
    if problems := world.agree(problems):
        raise CheckpointError(f"{checkpoint} is damaged: {'; '.join(problems)}. Load another checkpoint of this run.")
    unsafe: list[str] = []
    try:
        if world.is_main:
            refuse_code(checkpoint)
    except UnsafeCheckpoint as error:
        unsafe.append(f"{checkpoint} is refused: {error}. Do not use it; get it again from somebody you trust.")
    except (OSError, ValueError) as error:
        unsafe.append(f"{checkpoint} is damaged: {error}. Load another checkpoint of this run.")
    if unsafe := world.agree(unsafe):
        raise CheckpointError("\n".join(unsafe))


def _changed_files(checkpoint: Path, world: World) -> list[str]:
    """What is wrong with this rank's share of the files that `integrity.json` lists."""
    listed = json.loads((checkpoint / INTEGRITY_FNAME).read_text())
    if listed["algorithm"] != "sha256":
        return [f"{INTEGRITY_FNAME} uses {listed['algorithm']!r}, this version knows sha256"]
    problems: list[str] = []
    if missing := {".metadata", CONFIG_FNAME, "manifest.json"} - listed["files"].keys():
        problems.append(f"{INTEGRITY_FNAME} does not list {', '.join(sorted(missing))}")
    for name in sorted(listed["files"])[world.rank :: world.size]:
        try:
            with (checkpoint / name).open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
        else:
            if digest != listed["files"][name]:
                problems.append(f"{name} is not what was written")
    return problems


def check_fingerprint(start: Start, current: Mapping[str, str], allow: tuple[str, ...]) -> list[str]:
    """Compare the data with what the checkpoint was trained on; sentences about accepted changes.

    Raises `CheckpointError` naming every field that changed, because the order of samples would not continue.
    """
    if start.manifest is None or start.weights_only:
        return []
    saved = start.manifest.fingerprint
    if not saved:  # converted from a foreign format: no data was seen yet
        return []
    changed = [name for name in sorted({*saved, *current}) if saved.get(name) != current.get(name)]
    if refused := [name for name in changed if name not in allow]:
        lines = "; ".join(f"{name}: {saved.get(name)!r} -> {current.get(name)!r}" for name in refused)
        raise CheckpointError(
            f"the data changed since {start.checkpoint} was saved ({lines}), so an exact resume is not possible. "
            f"Restore it, accept the change with checkpoint.allow=[{','.join(refused)}], "
            "or start anew from it with --finetune and another --save."
        )
    return [f"Accepted change of data: {name}." for name in changed]


def _load(state: dict[str, Any], checkpoint: Path, world: World) -> dict[str, Any]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    _compare(state, checkpoint, world)
    loaded: Any = None
    problems: list[str] = []
    try:
        with warnings.catch_warnings():
            # About megatron-core's own calls: it reads without collectives on purpose, and passes by position.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            warnings.filterwarnings("ignore", message="The argument order of load", category=UserWarning)
            warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
            loaded = dist_checkpointing.load(state, str(checkpoint))
    except CheckpointException as error:  # its own text is a traceback of every rank
        problems += [f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()]
    except (CheckpointingException, KeyError, ValueError, RuntimeError, OSError) as error:
        problems.append(f"{type(error).__name__}: {error}")
    if problems := world.agree(problems):
        raise CheckpointError(f"{checkpoint} cannot be loaded: {'; '.join(problems)}.")
    return loaded


def _compare(state: dict[str, Any], checkpoint: Path, world: World) -> None:
    """Compare the names and shapes of all tensors before any is read, so that one sentence says what differs."""
    saved = {
        name: tuple(entry.size)
        for name, entry in read_metadata(checkpoint).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    wanted: dict[str, tuple[int, ...] | None] = {}
    for part in world.gather(_shapes(state)):
        wanted |= part
    shapes = [
        f"{name} is {list(saved[name])} there and {list(shape)} in the model"
        for name, shape in sorted(wanted.items())
        if shape and saved.get(name, shape) != shape
    ]
    # Optimizer state may be left out on purpose.
    extra = sorted(name for name in saved.keys() - wanted.keys() if not name.startswith("optimizer."))
    absent = sorted(wanted.keys() - saved.keys())
    problems = [
        *_first(shapes, "; ", ""),
        *_first(extra, ", ", "it holds tensors that the model does not have: "),
        *_first(absent, ", ", "it lacks "),
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint} does not fit this run: {'; '.join(problems)}. "
            "Load it with the model that was saved (config.yaml beside `checkpoints` says which)."
        )


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Global shape by name of every tensor this rank will ask for; None where padding may differ."""
    found: dict[str, tuple[int, ...] | None] = {}
    for value in nested_values(state):
        for tensor in nested_values([value.build()]) if isinstance(value, ShardedTensorFactory) else [value]:
            if isinstance(tensor, ShardedTensor):
                found[tensor.key] = None if tensor.allow_shape_mismatch else tuple(tensor.global_shape)
    return found


def _first(items: list[str], between: str, before: str) -> list[str]:
    """One sentence about the first few items, none without items."""
    if not items:
        return []
    more = f"{between}and {len(items) - 3} more" if len(items) > 3 else ""
    return [f"{before}{between.join(items[:3])}{more}"]


def _short(layout: Mapping[str, Any]) -> str:
    names = [name for name in ("tp", "cp", "dp", "pp", "vpp", "ep") if (layout.get(name) or 1) != 1]
    words = [f"{name}{layout[name]}" for name in names]
    words += ["sp"] if layout.get("sp") else []
    words += [f"encoder {layout['encoder']}"] if layout.get("encoder") else []
    return " ".join(words) or "one rank"
