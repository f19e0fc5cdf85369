"""Models of several components as a run has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from loongforge.core import plugins
from loongforge.core.config.run import ComponentConfig, ModelConfig


def model(section: Mapping[str, Any]) -> ModelConfig:
    """A `model` section, typed."""

    def component(values: Mapping[str, Any]) -> ComponentConfig:
        shape = {name: tuple(one) if isinstance(one, list) else one for name, one in values.items()}
        family = shape.pop("family")
        return ComponentConfig(family=family, geometry=plugins.load("models", family).config()(**shape))

    return ModelConfig(
        **{slot: component(values) for slot, values in section.items() if slot != "model_type"},
        model_type=section.get("model_type"),
    )


@pytest.fixture
def typed() -> Callable[[Mapping[str, Any]], ModelConfig]:
    return model
