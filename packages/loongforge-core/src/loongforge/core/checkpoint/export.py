"""Write the model as Hugging Face would: weights, configuration, tokenizer, in one directory that appears complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from loongforge.core import plugins
from loongforge.core.checkpoint.contract import MoveReport, WeightMove
from loongforge.core.checkpoint.parts import adapters_of, part_of, parts_of
from loongforge.core.checkpoint.sources import architectures, composition_of, is_apart
from loongforge.core.data.open import tokenizer_directory
from loongforge.core.errors import CheckpointError
from loongforge.core.lora.targets import AdapterSet, inventory_of
from loongforge.core.megatron.groups import World
from loongforge.core.plan import Plan
from loongforge.core.step.optimizer import gather_parameters


class HasModel(Protocol):
    """A built model or a training around it: wrapped chunks and tower, or plain ones."""

    @property
    def chunks(self) -> list[Any]:
        """One per virtual pipeline stage."""
        ...

    @property
    def tower(self) -> Any:
        """Encoder and projector; None where this rank holds neither."""
        ...


def export_directory(plan: Plan) -> Path | None:
    """Where this run exports to; None when it does not."""
    section = plan.config.checkpoint
    if not section.save_hf:
        return None
    assert section.save_hf_path or section.save, "the plan refuses save_hf without a directory"
    return Path(section.save_hf_path) if section.save_hf_path else Path(str(section.save)) / "hf"


def export_if_asked(plan: Plan, world: World, model: HasModel) -> Path | None:
    """Export when the run says so; the directory, or None."""
    path = export_directory(plan)
    if path:
        export_hf(plan, world, model, path)
    return path


def export_hf(plan: Plan, world: World, model: HasModel, path: Path) -> MoveReport:
    """Write the weights of a model. Collective; raises `CheckpointError` on every rank.

    Of a model with adapters these alone are written, in PEFT's format: the model is as it was loaded.
    A model that Hugging Face knows as one becomes one directory. Components that it does not know together are written
    side by side, each into a directory of its own that `load` of the component takes.
    """
    wrapped = [*model.chunks, *([] if model.tower is None else [model.tower])]
    gather_parameters([one for one in wrapped if hasattr(one, "ddp_config")])
    if plan.adapters:
        return _adapters_alone(plan, world, model, path)
    config = whole_config(plan)
    if config is None:
        return _side_by_side(plan, world, model, path.expanduser().resolve())
    parts = parts_of(plan, world, model.chunks, model.tower)
    config = _with_token_ids(plan, _with_source(plan, config, "foundation"))
    move = WeightMove(path=path, parts=parts, world=world, config=config, travel=_travel(plan))
    return _format().save()(move)


def _adapters_alone(plan: Plan, world: World, model: HasModel, path: Path) -> MoveReport:
    load = plan.config.model.foundation.load or plan.config.checkpoint.load
    base = str(Path(load).expanduser().resolve()) if load else None
    move = WeightMove(
        path=path,
        parts=adapters_of(plan, world, model.chunks, model.tower),
        world=world,
        config={},
        adapters=AdapterSet(base=base, adapters=plan.adapters, modules=inventory_of(plan).modules),
    )
    return plugins.load("checkpoints", "peft").save()(move)


def whole_config(plan: Plan) -> dict[str, Any] | None:
    """`config.json` of the whole model; None when Hugging Face has no architecture of these components."""
    model = plan.config.model
    if model.image_encoder is None:
        return model.foundation.geometry.to_hf()
    composition = composition_of(model)
    if composition is None or composition.to_hf is None or composition.prefixes is None:
        return None
    return composition.to_hf()(model)


def _side_by_side(plan: Plan, world: World, model: HasModel, path: Path) -> MoveReport:
    """Every component below a draft that takes the directory's name when all are complete."""
    components = plan.config.model.components
    draft = path.with_name(f".{path.name}.incomplete")
    _on_main(world, lambda: _begin(path, draft, set(components)))
    reports: list[MoveReport] = []
    try:
        for name, component in components.items():
            config = {"model_type": component.family.rpartition(":")[2], **component.geometry.to_hf()}
            move = WeightMove(
                path=draft / name,
                parts=(part_of(plan, world, model.chunks, model.tower, name),),
                world=world,
                config=_with_source(plan, config, name),
                travel=_travel(plan) if name == "foundation" else None,
            )
            reports.append(_format().save()(move))
        _on_main(world, lambda: _publish(draft, path))
    except CheckpointError:
        if world.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        world.barrier()
        raise
    return MoveReport(
        tensors=sum(one.tensors for one in reports),
        bytes=sum(one.bytes for one in reports),
        seconds=sum(one.seconds for one in reports),
    )


def _begin(path: Path, draft: Path, components: set[str]) -> None:
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: exists and is not a directory. Choose another directory for the export.")
    if path.is_dir() and (foreign := sorted({entry.name for entry in path.iterdir()} - components)):
        raise CheckpointError(
            f"{path}: holds {foreign[0]!r}, which no export of these components writes and replacing the directory "
            "would delete. Move it away or choose another directory for the export."
        )
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)


def _publish(draft: Path, path: Path) -> None:
    """Give the complete directory its name; what had it goes when the new one has it."""
    old = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    draft.rename(path)
    number = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
    shutil.rmtree(old, ignore_errors=True)


def _on_main(world: World, action: Any) -> None:
    """Do something on rank 0; all ranks raise when it fails."""
    problems: list[str] = []
    try:
        if world.is_main:
            action()
    except CheckpointError as problem:
        problems.append(str(problem))
    except OSError as error:
        problems.append(f"the export cannot be written: {error}. Free space or choose another directory.")
    if problems := world.agree(problems):
        raise CheckpointError("\n".join(problems))


def _format() -> plugins.FormatSpec:
    return plugins.load("checkpoints", "hf")


def _travel(plan: Plan) -> Path | None:
    directory = tokenizer_directory(plan)
    return Path(directory) if directory else None


def _with_source(plan: Plan, config: dict[str, Any], component: str) -> dict[str, Any]:
    """What is written, with fields only Hugging Face knows from the `config.json` the weights were loaded from."""
    section = plan.config.model.components[component]
    load = section.load or plan.config.checkpoint.load
    if not load:
        return config
    path = Path(load).expanduser()
    path = path / component if is_apart(path, component) else path
    source: dict[str, Any] = {}
    if (path / "config.json").is_file():
        source = json.loads((path / "config.json").read_text())
    named = architectures(source)
    if named and named != architectures(config):
        return config  # another architecture, whose fields mean something else
    source.pop("quantization_config", None)  # what is written is not quantised
    return {**source, **_nested(source, config)}


def _with_token_ids(plan: Plan, config: dict[str, Any]) -> dict[str, Any]:
    """What is written, with the ids of the tokens that stand for images as the tokenizer that travels along has them.

    A model from fresh weights has them from nowhere else.
    """
    composition, directory = composition_of(plan.config.model), _travel(plan)
    file = directory / "tokenizer.json" if directory else None
    if composition is None or file is None or not file.is_file():
        return config
    added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens", [])
    ids = {token["content"]: token["id"] for token in added}
    return config | {key: ids[text] for key, text in composition.token_ids if text in ids}


def _nested(source: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a whole model (`text_config`) keep their unknown fields too."""
    return {
        name: {**source[name], **value}
        if name.endswith("_config") and isinstance(value, dict) and isinstance(source.get(name), dict)
        else value
        for name, value in config.items()
    }
