"""The JSON schema of a run's YAML, for editors."""

from __future__ import annotations

from typing import Any

from loongforge.core import plugins
from loongforge.core.config.checked import adapter
from loongforge.core.config.components import CONTROL, SLOTS
from loongforge.core.config.run import RunConfig

DEFINED = {"image_encoder": "ImageEncoder", "image_projector": "ImageProjector", "foundation": "Foundation"}
"""Name of the definition of each slot."""


def json_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a run, every component being any of the registered families of its role."""
    schema = _of(RunConfig)
    definitions: dict[str, Any] = schema["$defs"]
    component, layout = definitions.pop("ComponentConfig"), definitions.pop("ComponentParallel")
    choices: dict[str, list[dict[str, str]]] = {slot: [] for slot in SLOTS}
    for plugin in plugins.usable("models"):
        if plugin.spec.role not in choices:
            continue  # `loongforge list models` shows it; no slot takes it
        key = f"{plugin.distribution}:{plugin.name}"
        shape = _of(plugin.spec.config())
        definitions |= shape.pop("$defs", {})
        definitions[key] = _joined(component, _layout(plugin.spec.role, definitions, layout), shape, plugin)
        choices[plugin.spec.role].append({"$ref": f"#/$defs/{key}"})
    model = definitions["ModelConfig"]
    for slot, name in DEFINED.items():
        described = str(model["properties"][slot].get("description", "The language model."))
        registered = {"anyOf": [*choices[slot], *([] if slot == "foundation" else [{"type": "null"}])]}
        definitions[name] = {**registered, "description": f"{described.rstrip('.')}: a registered {slot} family."}
        model["properties"][slot] = {"$ref": f"#/$defs/{name}"}
    model.pop("required", None)  # `defaults`, --model-name or --load may name the foundation
    schema.pop("required", None)
    schema["properties"]["defaults"] = {
        "type": "array",
        "description": "Hydra's defaults list: `- models/qwen3@model.foundation: qwen3_0_6b`.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "LoongForge run"}


def _layout(role: str, definitions: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """Layout fields of a component; a foundation's are the run's, besides its data parallel size."""
    own: dict[str, Any] = layout["properties"]
    if role != "foundation":
        return own
    return {**definitions["ParallelConfig"]["properties"], "data_parallel_size": own["data_parallel_size"]}


def _of(kind: type) -> dict[str, Any]:
    """Schema of one dataclass, its own definition at the top."""
    schema = adapter(kind).json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    top = definitions.pop(kind.__name__)
    return {**top, "$defs": definitions} if definitions else top


def _joined(
    component: dict[str, Any], layout: dict[str, Any], shape: dict[str, Any], plugin: plugins.Plugin
) -> dict[str, Any]:
    """How a component trains, where it runs and the shape of one family, as they stand together in the YAML."""
    names = [plugin.name, f"{plugin.distribution}:{plugin.name}"]
    control = {name: component["properties"][name] for name in CONTROL if name != "family"}
    return {
        "type": "object",
        "title": plugin.name,
        "description": plugin.spec.summary,
        "properties": {
            "family": {"enum": names, "description": "Registered family."},
            **control,
            **layout,
            **shape["properties"],
        },
        "additionalProperties": False,
    }
