"""Where each component's weights come from: the directory of `--load`, one of its own, or fresh numbers.

Reads configurations only; imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loongforge.core import plugins
from loongforge.core.config.run import ModelConfig
from loongforge.core.errors import CheckpointError
from loongforge.core.plugins import Composition

if TYPE_CHECKING:
    from loongforge.core.checkpoint.start import Start

RANDOM = "random"
"""What `load` of a component says for fresh numbers."""

Prefixes = tuple[tuple[str, str], ...]
"""How the beginnings of a component's own names are spelled in a whole model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A directory in a registered foreign format that holds the weights of one component."""

    path: Path
    format: str
    composition: str | None
    """Registered name of the composition whose whole model it is; None: the component's own."""
    prefixes: Prefixes | None
    """Of the component in that whole."""
    others: frozenset[str]
    """Further components that the directory holds."""


def sources(model: ModelConfig, start: Start) -> dict[str, Source | None]:
    """Source of every component, None for fresh numbers.

    A checkpoint of ours holds all components and needs no source. A component's own `load` goes before `--load`. Raises
    `CheckpointError` naming every path that cannot be one.
    """
    if start.checkpoint is not None:
        return {}
    found: dict[str, Source | None] = {}
    problems: list[str] = []
    for name, component in model.components.items():
        try:
            if component.load is not None:
                found[name] = None if component.load == RANDOM else _own(model, name, component.load)
            elif start.weights is not None:
                assert start.format is not None, "weights of a foreign format have one"
                found[name] = _shared(model, name, start.weights, start.format)
            else:
                found[name] = None
        except CheckpointError as problem:
            problems.append(str(problem))
    if problems:
        raise CheckpointError("\n".join(problems))
    return found


def fresh_components(model: ModelConfig, start: Start) -> frozenset[str]:
    """Components that no directory fills, so that the model must be built with initialised weights for them."""
    return frozenset(name for name, source in sources(model, start).items() if source is None)


def composition_of(model: ModelConfig) -> Composition | None:
    """The composition of a model of several components; None for a foundation alone."""
    if model.image_encoder is None or model.model_type is None:
        return None
    return plugins.load("compositions", model.model_type)


def module_prefixes(model: ModelConfig) -> dict[str, Prefixes]:
    """How the beginnings of every component's own names are spelled where PEFT names modules.

    In a model that Hugging Face knows as one as its class has them; else a foundation keeps its own names, which are
    those of a language model, and the others begin with their slot.
    """
    composition = composition_of(model)
    if composition is not None and composition.prefixes and composition.to_hf and composition.to_hf()(model):
        whole: dict[str, Prefixes] = composition.prefixes()(model)
        return {
            name: tuple((own, spelled(theirs, composition.modules) or theirs) for own, theirs in pairs)
            for name, pairs in whole.items()
        }
    return {name: (("", "" if name == "foundation" else f"{name}."),) for name in model.components}


def spelled(name: str, prefixes: Prefixes) -> str | None:
    """A name with the first beginning that fits exchanged; None when none fits."""
    pair = next((pair for pair in prefixes if name.startswith(pair[0])), None)
    return None if pair is None else pair[1] + name.removeprefix(pair[0])


def is_apart(path: Path, component: str) -> bool:
    """Whether `path` is an export of components side by side that holds this one."""
    return not (path / "config.json").is_file() and (path / component / "config.json").is_file()


def hf_config(path: Path, format_name: str) -> Mapping[str, Any]:
    """The model's own configuration in a directory of a foreign format."""
    spec: plugins.FormatSpec = plugins.load("checkpoints", format_name)
    return spec.read_config()(path)


def architectures(config: Mapping[str, Any]) -> frozenset[str]:
    """What `architectures` of a `config.json` names."""
    names: Any = config.get("architectures")
    return frozenset(map(str, names)) if isinstance(names, list | tuple) else frozenset()


def _own(model: ModelConfig, name: str, text: str) -> Source:
    """The source that `model.<name>.load` names."""
    said, path = f"model.{name}.load={text}", Path(text).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{said}: no such directory. Give a Hugging Face directory, or {RANDOM!r}.")
    if is_apart(path, name):
        path = path / name
    formats = [plugin for plugin in plugins.usable("checkpoints") if plugin.spec.holds == "model"]
    form = next((plugin.name for plugin in formats if plugin.spec.detect()(path)), None)
    if form is None:
        known = ", ".join(plugin.name for plugin in formats) or "none"
        raise CheckpointError(
            f"{said}: no registered format ({known}) knows this directory. Give a Hugging Face directory with "
            f"config.json and safetensors, or {RANDOM!r}."
        )
    whole = whole_of(path, form)
    if whole is None:
        return Source(path=path, format=form, composition=None, prefixes=None, others=frozenset())
    prefixes: dict[str, Prefixes] = whole.prefixes()(model) if whole.prefixes else {}
    if name not in prefixes:
        raise CheckpointError(
            f"{said}: is a model of {whole.name}, which has {', '.join(sorted(prefixes)) or 'no component'} and no "
            f"{name}. Give a directory that has one, or {RANDOM!r}."
        )
    others = frozenset(prefixes) - {name}
    return Source(path=path, format=form, composition=whole.name, prefixes=prefixes[name], others=others)


def _shared(model: ModelConfig, name: str, path: Path, form: str) -> Source | None:
    """What `--load` holds of a component; None when it does not hold it."""
    if is_apart(path, name):
        return Source(path=path / name, format=form, composition=None, prefixes=None, others=frozenset())
    if not (path / "config.json").is_file() and is_apart(path, "foundation"):
        return None
    whole = whole_of(path, form)
    if whole is None:
        if name != "foundation":
            return None
        return Source(path=path, format=form, composition=None, prefixes=None, others=frozenset())
    prefixes: dict[str, Prefixes] = whole.prefixes()(model) if whole.prefixes else {}
    if name not in prefixes:
        return None
    others = frozenset(prefixes) - {name}
    return Source(path=path, format=form, composition=whole.name, prefixes=prefixes[name], others=others)


def whole_of(path: Path, form: str) -> Composition | None:
    """The composition whose architecture a directory names."""
    names = architectures(hf_config(path, form))
    for plugin in plugins.usable("compositions"):
        if names & set(plugin.spec.hf_architectures):
            return plugin.spec
    return None
