"""Compose a run from YAML files, flags and overrides with `hydra.compose`; Hydra's global state is put back after."""

from __future__ import annotations

import difflib
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loongforge.core.config import families, yaml_file
from loongforge.core.config.arguments import Override
from loongforge.core.config.families import Size
from loongforge.core.errors import ConfigError, PluginError

RUN, FLAGS, ALL = "__run__", "__flags__", "__all__"
"""Names under which the user's YAML, the flags and both together are known to Hydra."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A run before types: only what somebody said, nothing filled in."""

    everything: DictConfig
    """YAML, flags and overrides."""
    yaml_only: dict[str, Any]
    """The YAML files alone, to say which of their values a flag beats."""


def compose(
    config_file: str | None, model: Size | None, flags: Mapping[str, Any], overrides: Sequence[Override]
) -> Composed:
    """Lay model YAML, run YAML, flags (dotted path to value) and overrides over each other, later ones winning.

    Raises `ConfigError` with every problem found before Hydra is asked, else with Hydra's one, in our words.
    """
    run = yaml_file.read(Path(config_file)) if config_file else {}
    choices = _last([_model_choice(override) for override in overrides if _is_model_choice(override)])
    values = [override for override in overrides if not _is_model_choice(override)]
    if model is not None:
        choices = _last([(model.package, model.group, model.option), *choices])
    nodes, problems = _nodes(run, choices)
    problems += _unreadable(values)
    if "hydra" in run:
        problems.append(f"{config_file}: hydra: Hydra's own settings have no effect here. Remove the section.")
    if problems:
        raise ConfigError(*problems)
    nodes[(None, FLAGS)] = _nested(flags)
    nodes[(None, ALL)] = {"defaults": [RUN, FLAGS]}
    folder = Path(config_file).resolve().parent if config_file else None
    try:
        with _hydra(folder, nodes):
            return _compose(values)
    except MissingConfigException as error:
        raise ConfigError(_missing(error, nodes)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_rephrased(error, config_file, nodes)) from error
    except yaml.YAMLError as error:  # in a file beside the run
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(yaml_file.complaint(mark.name if mark else "defaults", error)) from error


def plain(config: DictConfig) -> dict[str, Any]:
    """An ordinary dictionary with every `${...}` replaced; `ConfigError` names one that cannot be."""
    try:
        content: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}. Set what it refers to.") from error
    return content


def _compose(overrides: list[Override]) -> Composed:
    files = [override.hydra() for override in overrides if override.is_choice]
    everything = hydra.compose(ALL, [override.hydra() for override in overrides])
    from_yaml: Any = OmegaConf.to_container(hydra.compose(RUN, files), resolve=False)
    return Composed(everything=everything, yaml_only=from_yaml)


@contextmanager
def _hydra(folder: Path | None, nodes: Mapping[tuple[str | None, str], Any]) -> Generator[None]:
    """Hydra, initialised with `nodes` and the YAML files in `folder`; afterwards as it was before."""
    store, version = ConfigStore.instance(), VersionBase.instance()
    kept, base, outer = store.repo, version.version_base, GlobalHydra.instance().hydra
    resolvers = [name for name in ("now", "hydra", "python_version") if not OmegaConf.has_resolver(name)]
    store.repo = dict(kept)
    GlobalHydra.instance().clear()
    try:
        for (where, name), node in nodes.items():
            store.store(name=name, node=node, group=where, provider="loongforge")
        if folder is None:
            with hydra.initialize(config_path=None, version_base="1.3", job_name="loongforge"):
                yield
        else:
            with hydra.initialize_config_dir(str(folder), version_base="1.3", job_name="loongforge"):
                yield
    finally:
        store.repo, version.version_base, GlobalHydra.instance().hydra = kept, base, outer
        for name in resolvers:
            OmegaConf.clear_resolver(name)


def _nodes(
    run: dict[str, Any], choices: list[tuple[str, str, str]]
) -> tuple[dict[tuple[str | None, str], Any], list[str]]:
    """The run's YAML with its `defaults` made absolute and completed, and every model group it names."""
    listed = run.get("defaults", [])
    if not isinstance(listed, list):
        return {}, [f"defaults: must be a list, got {listed!r}."]
    defaults, groups, problems = _defaults(cast(list[Any], listed), choices)
    nodes: dict[tuple[str | None, str], Any] = {(None, RUN): {**run, "defaults": defaults}}
    for name, wanted in groups.items():
        try:
            found = families.configs(name, wanted)
        except (PluginError, ConfigError) as error:
            problems.append(f"models/{name}: {error}")
            continue
        nodes |= {(families.group(name), option): content for option, content in found.items()}
    return _without_swapped(nodes, defaults), problems


def _defaults(
    listed: list[Any], choices: list[tuple[str, str, str]]
) -> tuple[list[Any], dict[str, set[str]], list[str]]:
    """The defaults list, absolute and with `choices` in place of what they replace; options by group; problems."""
    problems: list[str] = []
    groups: dict[str, set[str]] = {}
    defaults: list[Any] = []
    replaced = {package for package, _, _ in choices}
    for entry in listed:
        if not _is_default(entry):
            problems.append(f"defaults: {entry!r} is neither a file nor 'models/FAMILY@model.foundation: SIZE'.")
            continue
        absolute, name = _absolute(entry)
        package = _package(absolute)
        if any(package == other or package.startswith(f"{other}.") for other in replaced):
            continue
        if name is not None:
            groups.setdefault(name, set()).update(_options(absolute))
        defaults.append(absolute)
    # A choice of a whole model stands below choices of its components.
    for package, name, option in sorted(choices, key=lambda choice: choice[0].count("."), reverse=True):
        groups.setdefault(name, set()).add(option)
        defaults.insert(0, {f"{families.group(name)}@{package}": None if option == "null" else option})
    if "_self_" not in defaults:
        defaults.append("_self_")  # the run's own values win over the files it names
    return defaults, groups, problems


def _without_swapped(
    nodes: dict[tuple[str | None, str], Any], defaults: list[Any]
) -> dict[tuple[str | None, str], Any]:
    """Files of whole models less the components that `defaults` name again: they are swapped, not mixed."""
    packages = [_package(entry) for entry in defaults]
    slots = {package.removeprefix("model.") for package in packages if package.startswith("model.")}
    whole = {str(next(iter(entry))).partition("@")[0].split()[-1] for entry in defaults if _package(entry) == "model"}
    return {
        (where, name): {key: value for key, value in content.items() if where not in whole or key not in slots}
        for (where, name), content in nodes.items()
    }


def _package(entry: str | dict[str, Any]) -> str:
    """Where a defaults entry puts its file, `model.foundation`; empty when it does not say."""
    return str(entry if isinstance(entry, str) else next(iter(entry))).partition("@")[2]


def _options(entry: str | dict[str, Any]) -> list[str]:
    """Files of the group that a defaults entry names."""
    if isinstance(entry, str):
        return [entry.partition("@")[0].rpartition("/")[2]]
    value = next(iter(entry.values()))
    return [value] if isinstance(value, str) else list(value or ())


def _is_default(entry: Any) -> bool:
    """True for `file`, `group: file`, `group: [file, file]` and `group: null`."""
    if not isinstance(entry, dict):
        return isinstance(entry, str)
    pairs = list(cast(dict[Any, Any], entry).items())
    return len(pairs) == 1 and isinstance(pairs[0][0], str) and isinstance(pairs[0][1], str | list | None)


def _absolute(entry: str | dict[str, Any]) -> tuple[str | dict[str, Any], str | None]:
    """A `defaults` entry without leading `../`, and the family it names, if any."""
    if isinstance(entry, str):
        return _stripped(entry, has_option=True)
    key, value = next(iter(entry.items()))
    path, family = _stripped(key, has_option=False)
    return {path: value}, family


def _stripped(path: str, *, has_option: bool) -> tuple[str, str | None]:
    match = re.fullmatch(
        r"(?P<word>(?:override|optional)\s+)?(?:\.\./|/)*models/(?P<rest>[^@]+)(?P<package>@.*)?", path
    )
    if match is None:
        return path, None
    rest = match["rest"].rstrip("/")
    family, _, option = rest.rpartition("/") if has_option else (rest, "", "")
    where = families.group(family.replace("/", ":")) + (f"/{option}" if has_option else "")
    return f"{match['word'] or ''}{where}{match['package'] or ''}", family.replace("/", ":")


def _is_model_choice(override: Override) -> bool:
    return override.mark != "~" and "@" in override.key and _stripped(override.key, has_option=False)[1] is not None


def _last(choices: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Choices of files without those that a later one of the same component, or of the whole model, replaces."""
    return [
        choice
        for number, choice in enumerate(choices, start=1)
        if not any(f"{choice[0]}.".startswith(f"{later[0]}.") for later in choices[number:])
    ]


def _model_choice(override: Override) -> tuple[str, str, str]:
    path, family = _stripped(override.key, has_option=False)
    assert family is not None, "only called for choices of a model"
    return path.partition("@")[2], family, override.value or ""


def _unreadable(overrides: list[Override]) -> list[str]:
    """What is wrong with the spelling of every override."""
    problems: list[str] = []
    parser = OverridesParser.create()
    for override in overrides:
        try:
            parsed = parser.parse_override(override.hydra())
        except HydraException as error:
            problems.append(f"{override.text!r}: cannot be read: {_first_line(error)}. {_quoting(override)}")
            continue
        if parsed.is_sweep_override():
            problems.append(f"{override.text!r}: names several values, a run has one. {_quoting(override)}")
    return problems


def _quoting(override: Override) -> str:
    return (
        f"Write a list as '{override.key}=[a,b]' and a text with commas, spaces or brackets in double quotes: "
        f"'{override.key}=\"...\"'."
    )


def _nested(flags: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flags.items():
        *sections, name = path.split(".")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = yaml_file.literal(value)
    return tree


def _missing(error: MissingConfigException, nodes: Mapping[tuple[str | None, str], Any]) -> str:
    wanted = error.missing_cfg_file or "?"
    where, _, option = wanted.rpartition("/")
    known = sorted(name for group, name in nodes if group == where)
    near = difflib.get_close_matches(option, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listing = f" Known: {', '.join(known)}." if known else ""
    return f"defaults: no configuration {wanted!r}.{hint}{listing}"


def _rephrased(error: Exception, config_file: str | None, nodes: Mapping[tuple[str | None, str], Any]) -> str:
    line = _first_line(error)
    quoted = re.search(r"'([^']+)'", line)
    if isinstance(error, ConfigCompositionException) and quoted:
        name = quoted[1]
        if line.startswith("Could not delete"):
            near = difflib.get_close_matches(name, [*_paths(nodes[(None, RUN)]), *_paths(nodes[(None, FLAGS)])], n=1)
            hint = f" Did you mean ~{near[0]}?" if near and near[0] != name else ""
            return f"~{name}: there is nothing to remove, no YAML file or flag sets it.{hint}"
        if line.startswith("Could not override"):
            listed: list[Any] = nodes[(None, RUN)]["defaults"]
            choices = [str(next(iter(cast(dict[Any, Any], entry)))) for entry in listed if isinstance(entry, dict)]
            near = difflib.get_close_matches(name, choices, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            return f"{name}: the defaults list of {config_file or 'this run'} has no such choice.{hint}"
    if choice := re.match(r"Override (\S+) looks like a config group .* group '([^']+)' does not exist", line):
        return f"{choice[1]}: there is no folder of YAML files {choice[2]!r} beside {config_file or 'this run'}."
    where = f"{error.full_key}: " if isinstance(error, OmegaConfBaseException) and error.full_key else ""
    return f"{config_file or 'configuration'}: {where}{line}."


def _paths(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of every value."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            yield f"{prefix}{name}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
