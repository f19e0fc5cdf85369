"""Which matrices of a run have an adapter, with its numbers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Protocol

from loongforge.core import plugins
from loongforge.core.checkpoint.sources import Prefixes, module_prefixes, spelled
from loongforge.core.config.lora import ALL_LINEAR, LoraConfig, Pattern, fits
from loongforge.core.config.run import RunConfig
from loongforge.core.lora.matrices import Inventory, Matrix, encoder_inventory, inventory, projector_inventory
from loongforge.core.model.geometry import EncoderGeometry, ProjectorGeometry, TransformerGeometry
from loongforge.core.model.weights import FuseQKV

SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One pair (A, B): the matrix plus scale x B A."""

    matrix: Matrix
    rank: int
    alpha: float
    rslora: bool
    dropout: float

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSet:
    """What a directory of adapters says of itself."""

    base: str | None
    """Directory of the model they belong to."""
    adapters: tuple[Adapter, ...]
    modules: tuple[str, ...]
    """Names of everything in the model that has a weight."""


class Shapes(Protocol):
    """A candidate or a plan: a model and the shapes of its components."""

    @property
    def config(self) -> RunConfig:
        """The run."""
        ...

    @property
    def geometry(self) -> TransformerGeometry:
        """Of the foundation."""
        ...

    @property
    def encoder_geometry(self) -> EncoderGeometry | None:
        """Of the encoder."""
        ...

    @property
    def projector_geometry(self) -> ProjectorGeometry | None:
        """Of the projector, with both sizes."""
        ...


def inventory_of(shapes: Shapes) -> Inventory:
    """The matrices of every component under PEFT's names; beside others a frozen component's can have no adapter."""
    model = shapes.config.model
    prefixes = module_prefixes(model)
    matrices: list[Matrix] = []
    others: list[str] = []
    refused: dict[str, str] = {}
    for name, component in model.components.items():
        found = _component(shapes, name)
        frozen = component.freeze and len(model.components) > 1
        for one in found.matrices:
            module = _named(one.module, prefixes[name])
            if frozen:
                others.append(module)
            else:
                matrices.append(replace(one, module=module))
        others += [_named(module, prefixes[name]) for module in found.others]
        refused |= found.refused
    return Inventory(matrices=tuple(matrices), others=tuple(others), refused=refused)


def _component(shapes: Shapes, name: str) -> Inventory:
    component = shapes.config.model.components[name]
    table = plugins.load("models", component.family).weights()(component.geometry)
    encoder, projector = shapes.encoder_geometry, shapes.projector_geometry
    if name == "foundation":
        return inventory(table, shapes.geometry)
    assert encoder is not None, "a model with other components has an encoder"
    if name == "image_encoder":
        return encoder_inventory(table, encoder)
    assert projector is not None, "it has a projector then"
    return projector_inventory(table, projector, encoder)


def _named(module: str, prefixes: Prefixes) -> str:
    """The name in the whole; what has no place there keeps its own."""
    return spelled(module, prefixes) or module


def adapters(section: LoraConfig, matrices: Sequence[Matrix]) -> tuple[Adapter, ...]:
    """The adapters of a run, in the order of the model; none when the section is off."""
    if section.rank is None:
        return ()
    rules = section.rules()
    return tuple(
        _adapter(section, rules, matrix)
        for matrix in matrices
        if any(meant(target, matrix) for target in section.target_modules)
    )


def meant(target: str, matrix: Matrix) -> bool:
    """Whether a target names this matrix."""
    return not matrix.is_router if target == ALL_LINEAR else fits(target, matrix.name(0))


def problems(section: LoraConfig, found: Inventory, tp: int) -> Iterator[str]:
    """What is wrong with the section for a model with these matrices, a sentence each."""
    chosen = adapters(section, found.matrices)
    yield from _without_place(section, found, nothing=not chosen)
    yield from _uneven_experts(section, found)
    language = (one.matrix.rule for one in chosen if one.matrix.component == "foundation")
    groups = [rule.num_query_groups for rule in language if isinstance(rule, FuseQKV)]
    if groups and tp > groups[0]:
        yield (
            f"lora: tensor_model_parallel_size={tp} cuts the {groups[0]} key/value heads, so the adapters of q_proj, "
            f"k_proj and v_proj cannot be split: use at most {groups[0]}, or leave these three out."
        )


def _without_place(section: LoraConfig, found: Inventory, *, nothing: bool) -> Iterator[str]:
    """Targets and patterns that mean no module; of a directory those alone that no model can have, or all.

    What else a directory names may belong to layers that this run leaves out: loading looks at every tensor.
    """
    if section.adapter_path is not None and nothing:
        yield f"lora.adapter_path: {section.adapter_path!r} adapts nothing of this model: is it another one's?"
    for field, texts in (
        ("target_modules", section.target_modules),
        ("patterns", tuple(rule.pattern for rule in section.rules())),
    ):
        for text in texts:
            known = section.adapter_path is not None and not any(end in text for end in found.refused)
            if not known and not any(meant(text, matrix) for matrix in found.matrices):
                yield f"lora.{field}: {text!r} matches nothing here; {_why_not(text, found)}"


def _why_not(text: str, found: Inventory) -> str:
    for end, reason in found.refused.items():
        if end in text:
            return f"{end}: {reason}. Leave it out."
    names = dict.fromkeys(".".join(one.module.rsplit(".", 2)[-2:]) for one in found.matrices if one.experts is None)
    names |= dict.fromkeys(f"experts.*.{one.leaf}" for one in found.matrices if one.experts is not None)
    shown = ", ".join(list(names)[:SHOWN]) + (" and others" if len(names) > SHOWN else "")
    return f"modules end in {shown}."


def _uneven_experts(section: LoraConfig, found: Inventory) -> Iterator[str]:
    """Experts of a layer are one tensor in a checkpoint of ours, so they are adapted alike."""
    patterns = [*section.target_modules, *(rule.pattern for rule in section.rules())]
    for text in patterns:
        for one in found.matrices:
            number = sum(fits(text, name) for name in one.names) if one.experts and text != ALL_LINEAR else 0
            if 0 < number < (one.experts or 0):
                yield (
                    f"lora: {text!r} fits {number} of the {one.experts} experts of layer {one.layer}: choose all "
                    f"experts of a layer alike, with a pattern such as 'layers.{one.layer}.mlp.experts.*.{one.leaf}'."
                )
                return


def _adapter(section: LoraConfig, rules: Sequence[Pattern], matrix: Matrix) -> Adapter:
    assert section.rank is not None, "asked of a section that is on"
    fitting = [rule for rule in rules if fits(rule.pattern, matrix.name(0))]
    rank = next((rule.rank for rule in fitting if rule.rank is not None), section.rank)
    alpha = next((rule.alpha for rule in fitting if rule.alpha is not None), section.alpha)
    return Adapter(
        matrix=matrix,
        rank=rank,
        alpha=float(rank) if alpha is None else alpha,
        rslora=section.rslora,
        dropout=next((rule.dropout for rule in fitting if rule.dropout is not None), section.dropout),
    )
