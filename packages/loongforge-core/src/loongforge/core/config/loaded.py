"""What a directory given to `--load` says about the model and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loongforge.core import plugins
from loongforge.core.config import families, yaml_file
from loongforge.core.config.components import OWN_LAYOUT, RUN_LAYOUT, SLOTS
from loongforge.core.errors import CheckpointError, ConfigError
from loongforge.core.plugins import Plugin

SAVED_RUN = "config.yaml"
"""File in the directory of a run that holds its resolved configuration."""

FOUNDATION = "foundation"
"""The slot that has a tokenizer, and its directory in an export that has one directory for each component."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "qwen.tiktoken")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Sections of a run, read from the directory of a checkpoint."""

    source: str
    """What kind of directory it is, for messages."""
    model: Mapping[str, Any]
    """Section `model`; empty when the directory does not say."""
    tokenizer: Mapping[str, Any]
    """Section `tokenizer`, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the run already says of its model; chooses where several registrations claim an architecture."""

    family: str | None
    """Of the foundation."""
    model_type: str | None


def inspect(directory: str, wanted: Wanted) -> Checkpoint | None:
    """Read a run of ours or a registered checkpoint format; None when the directory is neither.

    Raises `ConfigError` when the directory is of a known kind and its model cannot be trained.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        return None
    saved = path / SAVED_RUN
    if (path / "manifest.json").is_file() and not saved.is_file():
        saved = path.parent.parent / SAVED_RUN  # one checkpoint of a run: <run>/checkpoints/step_N
    if saved.is_file():
        content = yaml_file.read(saved)
        model = _without_training(content.get("model") or {})
        tokenizer: dict[str, Any] = {**(content.get("tokenizer") or {}), **_tokenizer(path / FOUNDATION)}
        return Checkpoint(source="run", model=model, tokenizer=tokenizer)
    for plugin in plugins.usable("checkpoints"):
        detect = plugin.spec.detect()
        if detect(path):
            if plugin.spec.holds == "adapter":
                raise ConfigError(f"checkpoint.load: {adapter_refusal(path)}")
            return _foreign(path, plugin, wanted)
        if detect(path / FOUNDATION):
            return Checkpoint(source=f"{plugin.name} export", model={}, tokenizer=_tokenizer(path / FOUNDATION))
    return None


def refusal(directory: str) -> str:
    """Why no model could be taken from a directory."""
    if not Path(directory).expanduser().is_dir():
        return f"checkpoint.load: no directory {directory!r}. A name on a hub is not a directory: download it first."
    formats = ", ".join(plugins.registered("checkpoints")) or "none"
    return (
        f"checkpoint.load: {directory!r} is neither a run (no {SAVED_RUN}) nor a checkpoint of a registered format "
        f"({formats}). Name the model with --model-name or --config-file."
    )


def adapter_refusal(path: Path) -> str:
    """Why adapters alone are no model."""
    return (
        f"{path} holds adapters, not a model: give the model that they belong to with --load, and this directory with "
        "--lora-adapter-path."
    )


def adapter_format(path: Path) -> Plugin:
    """The registered format of a directory of adapters; `ConfigError` when there is none."""
    able = [plugin for plugin in plugins.usable("checkpoints") if plugin.spec.holds == "adapter"]
    found = next((plugin for plugin in able if plugin.spec.detect()(path)), None)
    if found is None:
        known = ", ".join(plugin.name for plugin in able) or "none"
        raise ConfigError(
            f"lora.adapter_path: {str(path)!r} is no directory of adapters in a registered format ({known}). Give a "
            "directory with adapter_config.json and adapter_model.safetensors."
        )
    return found


def adapters(directory: str) -> dict[str, Any]:
    """The section `lora` that a directory of adapters describes."""
    path = Path(directory).expanduser()
    try:
        return adapter_format(path).spec.read_config()(path)
    except CheckpointError as error:
        raise ConfigError(*error.problems) from error


def _foreign(path: Path, plugin: Plugin, wanted: Wanted) -> Checkpoint:
    config: dict[str, Any] = plugin.spec.read_config()(path)
    owner = _owner(path, config, wanted)
    try:
        model = _described(owner, config)
    except ConfigError as error:
        raise ConfigError(*(f"{path}: {problem}" for problem in error.problems)) from error
    return Checkpoint(source=f"{plugin.name} checkpoint", model=model, tokenizer=_tokenizer(path))


def _tokenizer(path: Path) -> dict[str, Any]:
    """Section `tokenizer` of a directory, empty when it holds none."""
    return {"hf_tokenizer_path": str(path)} if any((path / file).is_file() for file in TOKENIZER_FILES) else {}


def _described(owner: Plugin, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `model` section that a foreign configuration describes."""
    if owner.kind == "compositions":
        return {"model_type": families.qualified(owner), **owner.spec.components()(config)}
    geometry: Any = owner.spec.config().from_hf(config)
    return {FOUNDATION: {"family": families.qualified(owner), **asdict(geometry)}}


def _owner(path: Path, config: Mapping[str, Any], wanted: Wanted) -> Plugin:
    """The one family or composition that claims an architecture of `config`."""
    architectures: list[str] = config.get("architectures") or []
    able = [plugin for plugin in plugins.usable("models") if plugin.spec.role == "foundation"]
    able += [plugin for plugin in plugins.usable("compositions") if plugin.spec.components is not None]
    claims = [plugin for plugin in able if set(architectures) & set(plugin.spec.hf_architectures)]
    if wanted.family is not None:
        claims = [plugin for plugin in claims if plugin.kind == "compositions" or _is(plugin, wanted.family)]
    if wanted.model_type is not None and len(claims) > 1:
        claims = [plugin for plugin in claims if plugin.kind == "models" or _is(plugin, wanted.model_type)]
    if len(claims) == 1:
        return claims[0]
    if claims:
        owners = " and ".join(f"{plugin.name} of {plugin.owner}" for plugin in claims)
        first = claims[0]
        field = "model.foundation.family" if first.kind == "models" else "model.model_type"
        raise ConfigError(
            f"{path}: {architectures[0]!r} is claimed by {owners}. Say whose: "
            f"{field}={first.distribution}:{first.name}."
        )
    known = sorted({name for plugin in able for name in plugin.spec.hf_architectures})
    said = f" in family {wanted.family!r}" if wanted.family else ""
    raise ConfigError(
        f"{path}: no registered family{said} knows the architecture {', '.join(architectures) or '(none is given)'}. "
        f"Known: {', '.join(known) or 'none'}. `loongforge list models` shows what is installed."
    )


def _is(plugin: Plugin, name: str) -> bool:
    return name in (plugin.name, f"{plugin.distribution}:{plugin.name}")


def _without_training(model: Mapping[str, Any]) -> dict[str, Any]:
    """A saved `model` section without what only holds for the run that was saved: layouts, and where weights began."""
    left_out = {*OWN_LAYOUT, *RUN_LAYOUT, "load"}
    return {
        name: {key: inner for key, inner in value.items() if key not in left_out} if name in SLOTS else value
        for name, value in model.items()
        if value is not None
    }
