"""The YAML files that families and compositions ship, as Hydra groups `models/<group>`, and the sizes they name.

A group pools every family of its name, every family that lists it in `ModelFamily.groups`, and the composition of its
name: `models/qwen3` has the dense and the mixture-of-experts sizes, `models/image_encoder` every encoder.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from loongforge.core import plugins
from loongforge.core.config import yaml_file
from loongforge.core.errors import ConfigError, PluginError
from loongforge.core.plugins import Plugin

KINDS = {"models": "model.foundation", "compositions": "model"}
"""What ships sizes that `--model-name` may name, and where such a file belongs in a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One YAML file of one family or composition."""

    group: str
    """As it is picked: `qwen3`, or `owner:qwen3`."""
    option: str
    """Name of the file without `.yaml`."""
    package: str
    """Where it belongs in a run: `model.foundation`, or `model` for a composition."""


def named(name: str) -> Size:
    """The size that `--model-name` means; case, dashes, dots and underscores do not count."""
    owner, _, bare = name.rpartition(":")
    found: list[tuple[Plugin, str]] = []
    parts: list[tuple[Plugin, str]] = []
    known: list[str] = []
    for plugin, option in _sizes():
        fits = _plain(option) == _plain(bare) and owner in ("", plugin.distribution)
        if getattr(plugin.spec, "role", "foundation") != "foundation":
            parts += [(plugin, option)] if fits else []
            continue
        known.append(option)
        found += [(plugin, option)] if fits else []
    found.sort(key=lambda one: one[0].distribution)
    if len(found) > 1:
        choices = " or ".join(f"--model-name {plugin.distribution}:{name}" for plugin, _ in found)
        owners = " and ".join(plugin.owner for plugin, _ in found)
        raise ConfigError(f"--model-name: {name!r} is registered by {owners}. Say whose: {choices}.")
    if found:
        plugin, option = found[0]
        return Size(group=qualified(plugin), option=option, package=KINDS[plugin.kind])
    if parts:
        plugin, option = parts[0]
        role = plugin.spec.role
        raise ConfigError(
            f"--model-name: {name!r} is an {role}, one part of a model. Name it in the `defaults` of a --config-file, "
            f"`- models/{role}@model.{role}: {option}`, or as an override, models/{role}@model.{role}={option}."
        )
    near = difflib.get_close_matches(_plain(bare), {_plain(option): option for option in known}, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"--model-name: no model {name!r}.{hint} Known: {', '.join(sorted(set(known))) or 'none'}. "
        "A Hugging Face directory is given with --load."
    )


def group(name: str) -> str:
    """Hydra group of a family, composition or pool: `models/qwen3`, `models/owner/qwen3`."""
    return "models/" + name.replace(":", "/")


def configs(name: str, wanted: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Contents of every YAML file of a group by name; `PluginError` or `ConfigError` says what is wrong.

    A file name that several members have is an error when it is `wanted`, and left out otherwise.
    """
    found: dict[str, list[tuple[Plugin, dict[str, Any]]]] = {}
    for plugin in _members(name):
        for option, content in _files(plugin, named_owner=":" in name):
            found.setdefault(option, []).append((plugin, content))
    for option in wanted:
        rivals = [plugin for plugin, _ in found.get(option, ())]
        if len(rivals) > 1:
            owners = " and ".join(f"{plugin.name} of {plugin.owner}" for plugin in rivals)
            choices = " or ".join(f"'models/{plugin.distribution}:{plugin.name}'" for plugin in rivals)
            raise ConfigError(f"{option!r} is a size of {owners}. Say whose: {choices}.")
    return {option: contents[0][1] for option, contents in found.items() if len(contents) == 1}


def qualified(plugin: Plugin) -> str:
    """The name under which one registration is picked: with its owner where another has the same name."""
    alone = len(plugins.registered(plugin.kind)[plugin.name]) == 1
    return plugin.name if alone else f"{plugin.distribution}:{plugin.name}"


def fitting(role: str) -> list[str]:
    """Names of the families that fill a slot of a model."""
    return sorted({plugin.name for plugin in plugins.usable("models") if plugin.spec.role == role})


def _sizes() -> Iterator[tuple[Plugin, str]]:
    for kind in KINDS:
        for plugin in plugins.usable(kind):
            for option in plugin.spec.sizes:
                yield plugin, option


def _members(name: str) -> list[Plugin]:
    """Registrations whose files a group has; `PluginError` when there are none, or two owners of its name."""
    bare = name.rpartition(":")[2]
    own = [plugins.pick(kind, name) for kind in KINDS if bare in plugins.registered(kind)]
    own = [plugin for plugin in own if plugin.kind == "models" or plugin.spec.configs is not None]
    pooled = [plugin for plugin in plugins.usable("models") if ":" not in name and name in plugin.spec.groups]
    members = [*own, *(plugin for plugin in pooled if plugin not in own)]
    if not members:
        for kind in KINDS:
            plugins.refuse_switched_off(kind, bare)
        pools = {pool for plugin in plugins.usable("models") for pool in plugin.spec.groups}
        known = sorted({*plugins.registered("models"), *plugins.registered("compositions"), *pools})
        hint = plugins.did_you_mean(bare, known)
        raise PluginError(f"no model {name!r}.{hint} Known: {', '.join(known) or 'none'}.")
    return members


def _files(plugin: Plugin, *, named_owner: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every YAML file of one registration, with the owner in its family's name where that is needed."""
    key = "family" if plugin.kind == "models" else "model_type"
    chosen = f"{plugin.distribution}:{plugin.name}" if named_owner else qualified(plugin)
    for path in sorted((plugin.folder() / plugin.spec.configs).glob("*.yaml")):
        content = yaml_file.read(path)
        if plugin.kind == "compositions":
            content.setdefault("model_type", plugin.name)
        if content.get(key) == plugin.name:
            content[key] = chosen
        yield path.stem, content


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")
