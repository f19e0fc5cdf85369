"""Write a resolved run so that it resolves again to the same run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import yaml

from loongforge.core.config.components import SLOTS
from loongforge.core.config.run import RunConfig
from loongforge.core.config.yaml_file import literal


def dump(config: RunConfig) -> dict[str, Any]:
    """The run as plain data, shaped as its YAML: a component's shape and layout stand beside its other fields."""
    content: dict[str, Any] = _lists(asdict(config))
    model: dict[str, Any] = content["model"]
    for slot in SLOTS:
        component: dict[str, Any] | None = model.pop(slot)
        if component is not None:
            layout = {name: value for name, value in component.pop("parallel").items() if value is not None}
            geometry = component.pop("geometry")
            model[slot] = {**component, **layout, **geometry}
    return content


def to_yaml(config: RunConfig) -> str:
    """The text of `<save>/config.yaml`."""
    return yaml.safe_dump(literal(dump(config)), sort_keys=False, allow_unicode=True, width=120)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lists(one) for name, one in cast(dict[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_lists(one) for one in cast(list[Any], value)]
    return value
