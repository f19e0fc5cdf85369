"""From a plain dictionary to frozen dataclasses, with every problem found before one error is raised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from packaging.requirements import InvalidRequirement, Requirement

from loongforge.core.config.checked import Problems, check, mapping, unknown
from loongforge.core.config.components import as_model
from loongforge.core.config.run import ComponentConfig, ModelConfig, ParallelConfig, RunConfig
from loongforge.core.errors import ConfigError


def build(content: Mapping[str, Any], origins: Mapping[str, str], earlier: list[str]) -> RunConfig:
    """The typed run, or one `ConfigError` with `earlier` problems and every one found here."""
    problems = Problems(origins=origins, found=list(earlier))
    for path in _targets(content, ""):
        problems.add(path, "is never executed. Name a registered family, source or format instead.")
    content = dict(_without_targets(content))
    sections = {section.name: section for section in fields(RunConfig)}
    for name in [name for name in content if name not in sections]:
        problems.add(name, unknown(name, content.pop(name), list(sections)))
    model = mapping(content.pop("model", {}), "model", problems)
    parallel = mapping(content.pop("parallel", {}), "parallel", problems)
    values: dict[str, Any] = {"model": as_model(model, parallel, problems)}
    values["parallel"] = check(ParallelConfig, parallel, "parallel", problems)
    scalars = {name: content.pop(name) for name in ("platform", "requires") if content.get(name) is not None}
    for name, value in content.items():
        if value is not None:
            kind: Any = sections[name].default_factory
            values[name] = check(kind, mapping(value, name, problems), name, problems)
    placeholder = ModelConfig(foundation=ComponentConfig(family="", geometry=None))
    top = check(RunConfig, {"model": placeholder, **scalars}, "", problems)
    if top is not None:
        for line in unmet(top.requires):
            problems.add("requires", line)
    if problems.found:
        raise ConfigError(*problems.found)
    assert top is not None, "without problems there is a run"
    return RunConfig(**values, requires=top.requires, platform=top.platform)


def unmet(requires: tuple[str, ...]) -> Iterator[str]:
    """One sentence for every requirement that this environment does not meet."""
    for line in requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            yield f"{line!r} is not a requirement such as 'acme-mamba>=0.3': {str(error).splitlines()[0]}."
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            yield f"{line} is not installed: pip install '{line}'."
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            yield f"{line} is needed, {requirement.name} {installed} is installed: pip install '{line}'."


def _targets(content: Any, path: str) -> Iterator[str]:
    """Paths of every `_target_`, which Hydra's instantiate would execute."""
    if isinstance(content, Mapping):
        for name, value in cast(Mapping[Any, Any], content).items():
            inner = f"{path}.{name}" if path else str(name)
            if name == "_target_":
                yield inner
            yield from _targets(value, inner)
    elif isinstance(content, list):
        for number, value in enumerate(cast(list[Any], content)):
            yield from _targets(value, f"{path}.{number}")


def _without_targets(content: Any) -> Any:
    if isinstance(content, Mapping):
        items = cast(Mapping[Any, Any], content).items()
        return {name: _without_targets(value) for name, value in items if name != "_target_"}
    return content
