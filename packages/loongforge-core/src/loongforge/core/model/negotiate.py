"""Whether the components of a model fit together, from their shapes alone; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from loongforge.core import plugins
from loongforge.core.config.run import ComponentConfig, ModelConfig
from loongforge.core.errors import PluginError
from loongforge.core.model.geometry import EncoderGeometry, ProjectorGeometry, TransformerGeometry


def negotiate(model: ModelConfig) -> list[str]:
    """Every reason why the components do not fit, each naming both sides and the remedy; empty when they do.

    What needs no agreement: the number of feature levels a projector turns (it takes as many as there are). The rows of
    position ids are compared where the composition's processor is made, in `data.open`.
    """
    if model.image_encoder is None or model.image_projector is None:
        return list(_alone(model))
    encoder: EncoderGeometry = model.image_encoder.geometry.geometry()
    projector: ProjectorGeometry = model.image_projector.geometry.geometry()
    foundation: TransformerGeometry = model.foundation.geometry.geometry()
    names = [_named(slot, component) for slot, component in model.components.items()]
    return [
        *_composition(model),
        *_widths(encoder, projector, foundation, names),
        *_deepstack(encoder, foundation, names),
    ]


def _alone(model: ModelConfig) -> Iterator[str]:
    """An encoder and a projector come together; `config.components` says so of YAML, this of configurations in code."""
    if model.image_encoder is not None:
        yield "model.image_encoder needs a model.image_projector beside it: add one, or leave both out."
    if model.image_projector is not None:
        yield "model.image_projector needs a model.image_encoder beside it: add one, or leave both out."


def _composition(model: ModelConfig) -> Iterator[str]:
    """The composition says how images become patches and where features stand among the tokens."""
    known = ", ".join(plugins.registered("compositions")) or "none"
    if model.model_type is None:
        yield (
            "model.model_type is not given, but a model with an image_encoder needs a composition, which says how "
            f"images are prepared: name one of {known}."
        )
        return
    try:
        plugins.load("compositions", model.model_type)
    except PluginError as error:
        yield f"model.model_type: {error}"


def _widths(
    encoder: EncoderGeometry, projector: ProjectorGeometry, foundation: TransformerGeometry, names: list[str]
) -> Iterator[str]:
    sides = (
        ("input_size", projector.input_size, names[0], encoder.hidden_size),
        ("output_size", projector.output_size, names[2], foundation.hidden_size),
    )
    for field, stated, neighbour, width in sides:
        if stated not in (None, width):
            yield (
                f"{names[1]} states {field}={stated}, but {neighbour} has hidden_size={width}: set "
                f"model.image_projector.{field}=null to take it from there, or choose a projector of this width."
            )


def _deepstack(encoder: EncoderGeometry, foundation: TransformerGeometry, names: list[str]) -> Iterator[str]:
    if encoder.levels > foundation.num_layers:
        yield (
            f"{names[0]} hands features of {encoder.levels} of its layers to the first layers of the foundation, but "
            f"{names[2]} has num_layers={foundation.num_layers}: use a deeper foundation, or fewer deepstack layers in "
            "the encoder."
        )


def _named(slot: str, component: ComponentConfig) -> str:
    return f"model.{slot} ({component.family})"
