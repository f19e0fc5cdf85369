"""Build this rank's model chunks and decide which of their parameters train."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from loongforge.core import plugins
from loongforge.core.errors import ConfigError
from loongforge.core.lora.attach import attach
from loongforge.core.lora.table import is_adapter
from loongforge.core.megatron.groups import World
from loongforge.core.megatron.specs import Layers, layers_for
from loongforge.core.megatron.transformer_config import compute_type, transformer_config
from loongforge.core.model.contract import BuildContext, TowerContext
from loongforge.core.model.names import whole_model_names
from loongforge.core.model.omni import Tower
from loongforge.core.model.trainable import Part, count_parts, is_indexer
from loongforge.core.plan import Plan
from loongforge.core.plan.index import warms_up

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True, kw_only=True)
class Model:
    """This rank's part of the model."""

    chunks: list[torch.nn.Module]
    """Of the foundation: one per virtual pipeline stage."""
    tower: Tower | None
    """Encoder and projector; None in a model without them, and on ranks that hold neither."""
    layers: Layers
    parts: tuple[Part, ...]
    """What trains, over the whole model."""

    @property
    def modules(self) -> dict[str, list[torch.nn.Module]]:
        """Modules of each component on this rank, data's way through the model."""
        found: dict[str, list[torch.nn.Module]] = {}
        if self.tower is not None:
            found |= {name: [module] for name, module in self.tower.named_children()}
        return found | {"foundation": self.chunks}


def build_model(plan: Plan, world: World, *, fresh: Collection[str] | None = None) -> Model:
    """Build every component of this rank on its device, with its adapters, then freeze what the run says.

    Components outside `fresh` keep their weights unset because a checkpoint is about to fill them; None: none does.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    place = world.groups
    model_parallel_cuda_manual_seed(
        plan.config.train.seed, tp_rank=place.tp.rank(), ep_rank=place.ep.rank(), etp_rank=place.expt_tp.rank()
    )
    layers = layers_for(world.platform, compute_type(plan.config.train))
    starting = plan.config.model.components.keys() if fresh is None else fresh
    initialise = "foundation" in starting
    chunks = _foundation(plan, world, layers, initialise=initialise) if world.holds_foundation else []
    if plan.adapters and chunks:
        attach(chunks, plan.adapters_in("foundation"), world.groups, plan.config.train.seed)
    tower = build_tower(plan, world, layers, starting) if world.encoder else None
    model = Model(chunks=chunks, tower=tower, layers=layers, parts=())
    names = {component: whole_model_names(modules) for component, modules in model.modules.items()}
    freeze(plan, names, world)
    parts = [
        part
        for component in plan.config.model.components
        for part in count_parts(component, names.get(component, {}), holder_of(component, world), world)
    ]
    return replace(model, parts=tuple(parts))


def _foundation(plan: Plan, world: World, layers: Layers, *, initialise: bool) -> list[torch.nn.Module]:
    component = plan.config.model.foundation
    family = plugins.load("models", component.family)
    config = transformer_config(plan.geometry, plan.config, plan.layout, layers, initialise=initialise)
    chunks: list[torch.nn.Module] = []
    for stage in range(plan.layout.num_chunks):
        first, last = _ends(world, stage)
        context = BuildContext(
            config=config,
            groups=world.groups,
            layers=layers,
            padded_vocab_size=plan.padded_vocab_size,
            seq_length=plan.config.train.seq_length,
            pre_process=first,
            post_process=last,
            vp_stage=stage if plan.layout.vpp else None,
            deepstack=plan.encoder_geometry.levels if plan.encoder_geometry else 0,
        )
        chunk = family.build()(component.geometry, context)
        chunks.append(chunk.to(world.device))
    return chunks


def build_tower(plan: Plan, world: World, layers: Layers, fresh: Collection[str]) -> Tower:
    """Encoder and projector on the encoder's own grid, with their adapters."""
    assert world.encoder is not None, "this rank is in the encoder's grid"
    assert plan.encoder_geometry is not None, "the plan has its shape"
    made: list[torch.nn.Module] = []
    for slot in ("image_encoder", "image_projector"):
        component = plan.config.model.components[slot]
        context = TowerContext(
            run=plan.config,
            component=component,
            groups=world.encoder.groups,
            layers=layers,
            initialise=slot in fresh,
            encoder=plan.encoder_geometry,
            output_size=plan.geometry.hidden_size,
        )
        with _fresh_random(plan.config.train.seed, world.encoder.groups.tp.rank()):
            made.append(plugins.load("models", component.family).build()(component.geometry, context))
        if plan.adapters:
            attach(made[-1:], plan.adapters_in(slot), world.encoder.groups, plan.config.train.seed)
    return Tower(made[0], made[1], plan.encoder_geometry).to(world.device)


@contextmanager
def _fresh_random(seed: int, tp_rank: int) -> Iterator[None]:
    """Random states for a component of another grid, put back after: whole matrices agree on all ranks, parts differ
    between tensor parallel ranks."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker: Any = get_cuda_rng_tracker()
    kept, host, device = tracker.get_states(), torch.random.get_rng_state(), torch.cuda.get_rng_state()
    tracker.reset()
    for number, name in enumerate(kept):
        tracker.add(name, seed + 7919 * (1 + tp_rank) + number)  # away from the foundation's seeds
    torch.manual_seed(seed)
    torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        tracker.set_states(kept)
        torch.random.set_rng_state(host)
        torch.cuda.set_rng_state(device)


def holder_of(component: str, world: World) -> ProcessGroupCollection | None:
    """Groups of a component's own grid on this rank; None where it holds none of it."""
    if component != "foundation":
        return world.encoder_groups
    return world.groups if world.holds_foundation else None


def _ends(world: World, stage: int) -> tuple[bool, bool]:
    last_chunk = world.layout.num_chunks - 1
    return world.is_first_stage and stage == 0, world.is_last_stage and stage == last_chunk


def freeze(plan: Plan, names: Mapping[str, Mapping[str, torch.nn.Parameter]], world: World) -> None:
    """Turn gradients off for frozen components and patterns, and in the warm-up of indexers for the rest of the
    foundation; a pattern that matches nothing on any rank is an error.

    `names` are this rank's parameters by component and whole-model name. In a model of several components a pattern
    sees `component.name`.
    """
    model = plan.config.model
    patterns = {text: _pattern(text) for text in model.freeze_parameters}
    matched: set[str] = set()
    shown: list[str] = []
    train = 0
    for component, parameters in names.items():
        prefix = f"{component}." if len(model.components) > 1 else ""
        for name, parameter in parameters.items():
            hits = {text for text, pattern in patterns.items() if pattern.search(prefix + name)}
            matched |= hits
            frozen = model.components[component].freeze and not is_adapter(name)
            frozen |= component == "foundation" and warms_up(plan.geometry) and not is_indexer(name)
            if frozen or hits:
                parameter.requires_grad_(False)
            train += parameter.numel() if parameter.requires_grad else 0
            shown.append(prefix + name)
    if patterns:
        everywhere = world.gather((matched, train))
        idle = [text for text in patterns if not any(text in found for found, _ in everywhere)]
        if idle:
            # Rank 0 holds the first stage: all ranks show its names and so raise the same error.
            example = world.gather(shown[:3])[0]
            raise ConfigError(
                *(f"model.freeze_parameters: {text!r} matches no parameter; names are like {example}." for text in idle)
            )
        if plan.config.optimizer.lr > 0 and not any(trained for _, trained in everywhere):
            raise ConfigError(
                f"model.freeze_parameters={list(patterns)} leaves nothing to train: freeze less, or set lr to 0."
            )


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"model.freeze_parameters: {text!r} is not a regular expression: {error}.") from error
