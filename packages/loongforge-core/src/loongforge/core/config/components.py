"""The `model` section, typed: a component's family says what shape it has, and the slot says what it may be."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from loongforge.core import plugins
from loongforge.core.config import families
from loongforge.core.config.checked import Problems, check, mapping
from loongforge.core.config.run import ComponentConfig, ComponentParallel, ModelConfig, ParallelConfig
from loongforge.core.errors import PluginError

SLOTS = ("image_encoder", "image_projector", "foundation")
"""Components of a model in the order data takes; a family's role is the slot it fills."""

CONTROL = tuple(one.name for one in fields(ComponentConfig) if one.name not in ("geometry", "parallel"))
"""Fields of a component besides its shape and its layout: family, freeze, lr_mult, load."""

OWN_LAYOUT = tuple(one.name for one in fields(ComponentParallel))
RUN_LAYOUT = tuple(one.name for one in fields(ParallelConfig))


def as_model(content: dict[str, Any], parallel: dict[str, Any], problems: Problems) -> ModelConfig | None:
    """The typed model of a `model` section, or None after noting what is wrong.

    Layout fields of the foundation move to `parallel`, which they share with the run.
    """
    built: dict[str, ComponentConfig | None] = {}
    wrong = False
    for slot in SLOTS:
        given = content.pop(slot, None)
        if given is not None:
            path = f"model.{slot}"
            built[slot] = _component(slot, mapping(given, path, problems), parallel, problems)
            wrong = wrong or built[slot] is None
    if "foundation" not in built:
        problems.add(
            "model", "no model is named. Give --model-name NAME, --load DIR, or a --config-file that names one."
        )
    for present, absent in (("image_encoder", "image_projector"), ("image_projector", "image_encoder")):
        if built.get(present) is not None and absent not in built:
            offered = ", ".join(families.fitting(absent)) or "none"
            problems.add(
                f"model.{present}",
                f"needs an {absent} beside it. Name one in the `defaults`, `- models/{absent}@model.{absent}: SIZE` "
                f"(registered: {offered}), or leave both out.",
            )
    placeholder = ComponentConfig(family="", geometry=None)
    model = check(
        ModelConfig, {**content, **built, "foundation": built.get("foundation") or placeholder}, "model", problems
    )
    return model if "foundation" in built and not wrong else None


def _component(
    slot: str, content: dict[str, Any], parallel: dict[str, Any], problems: Problems
) -> ComponentConfig | None:
    """Split a component into how it trains, where it runs and what shape it has."""
    path = f"model.{slot}"
    control = {name: content.pop(name) for name in CONTROL if name in content}
    layout = _foundation_layout if slot == "foundation" else _own_layout
    own = layout(content, path, parallel, problems)
    shape = _shape(slot, control.get("family"), path, problems)
    if shape is None:
        return None
    legal = (*CONTROL, *OWN_LAYOUT)
    geometry = check(shape, content, path, problems, legal)
    placed = check(ComponentParallel, own, path, problems)
    component = check(ComponentConfig, {**control, "geometry": None}, path, problems, legal)
    if geometry is None or component is None or placed is None:
        return None
    values = {name: getattr(component, name) for name in CONTROL}
    return ComponentConfig(**values, geometry=geometry, parallel=placed)


def _foundation_layout(
    content: dict[str, Any], path: str, parallel: dict[str, Any], problems: Problems
) -> dict[str, Any]:
    """Move layout fields to the run's; what remains is the foundation's own statement, its data parallel size."""
    for name in [name for name in RUN_LAYOUT if name in content]:
        value = content.pop(name)
        if str(parallel.setdefault(name, value)).lower() != str(value).lower():
            problems.add(
                f"{path}.{name}",
                f"is {value!r}, but parallel.{name} is {parallel[name]!r}. The foundation defines the run's layout: "
                "give one of them.",
            )
    return {name: content.pop(name) for name in OWN_LAYOUT if name in content}


def _own_layout(content: dict[str, Any], path: str, parallel: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """Layout fields of an encoder or projector; those that only a run has are problems."""
    own = {name: content.pop(name) for name in OWN_LAYOUT if name in content}
    for name in [name for name in RUN_LAYOUT if name in content]:
        problems.add(
            f"{path}.{name}", f"belongs to the whole run, got {content.pop(name)!r} here. Set parallel.{name}."
        )
    return own


def _shape(slot: str, family: Any, path: str, problems: Problems) -> type | None:
    """The geometry dataclass of a family that fits the slot, or None after noting why there is none."""
    offered = f"Registered for this slot: {', '.join(families.fitting(slot)) or 'none'}."
    if family is None:
        problems.add(f"{path}.family", f"is required and not given: this model has no {slot} yet. {offered}")
        return None
    if not isinstance(family, str):
        problems.add(f"{path}.family", f"must name a model family, got {family!r}. {offered}")
        return None
    try:
        spec = plugins.load("models", family)
        if spec.role != slot:
            problems.add(f"{path}.family", f"{family!r} is a family of the role {spec.role}, not {slot}. {offered}")
            return None
        return spec.config()
    except PluginError as error:
        problems.add(f"{path}.family", str(error))
        return None
