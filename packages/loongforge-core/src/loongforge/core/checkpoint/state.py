"""What a checkpoint holds, as megatron-core's sharded state: weights, optimizers, schedule, random states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from loongforge.core.checkpoint import optimizer_state, random_state
from loongforge.core.checkpoint.parts import unwrap
from loongforge.core.lora.table import is_adapter
from loongforge.core.megatron.groups import World
from loongforge.core.plan import Plan
from loongforge.core.step.optimizer import Training, gather_parameters


def layout_facts(plan: Plan) -> dict[str, Any]:
    """The layout as a manifest holds it: random states are good for the same one only."""
    names = ("world", "tp", "cp", "dp", "pp", "vpp", "ep", "etp", "sp")
    facts: dict[str, Any] = {name: getattr(plan.layout, name) for name in names}
    return facts if plan.encoder is None else {**facts, "encoder": str(plan.encoder)}


def lora_facts(plan: Plan) -> dict[str, Any]:
    """The adapters as a manifest holds them; empty without any."""
    section = plan.config.lora
    if not section.on:
        return {}
    return {
        "rank": section.rank,
        "alpha": section.alpha,
        "rslora": section.rslora,
        "target_modules": list(section.target_modules),
        "patterns": list(section.patterns),
    }


def model_state(world: World, chunks: Sequence[Any], tower: Any, *, adapters: bool = True) -> dict[str, Any]:
    """Sharded weights of every chunk and of the tower, under names that do not depend on the layout.

    Without `adapters` those of the model alone, as it is saved where it has none.
    """
    state: dict[str, Any] = {}
    for number, chunk in enumerate(chunks):
        module: Any = unwrap(chunk)
        _name_group(module, world.groups)
        metadata: dict[str, Any] = {"dp_cp_group": world.dp_cp}
        adapted = [name for name, _ in module.named_parameters() if is_adapter(name)]
        if adapted and adapters:
            metadata["non_homogeneous_layers"] = True  # a layer may have other adapters than its neighbour
        own = module.sharded_state_dict(metadata=metadata)
        left_out = set() if adapters else set(adapted)
        state[f"model{number}"] = {name: tensor for name, tensor in own.items() if name not in left_out}
    if tower is not None:
        assert world.encoder_groups is not None, "a rank with a tower is in the encoder's grid"
        module = unwrap(tower)
        adapted = {name for name, _ in module.named_parameters() if is_adapter(name)}
        own = tower_state(module, world.encoder_groups, alike=not (adapted and adapters))
        state["tower"] = own if adapters else {name: one for name, one in own.items() if name not in adapted}
    return state


def tower_state(
    module: torch.nn.Module, groups: ProcessGroupCollection, prefix: str = "", *, alike: bool = True
) -> dict[str, Any]:
    """Sharded weights of a module that lives in a grid of its own: nothing is asked of megatron-core's globals.

    megatron-core's modules with a tensor parallel group of their own describe themselves. Any other module is described
    here, child by child: its parameters are split where they say so, and whole on every rank otherwise. `alike`: every
    layer has the parameters that its neighbour has.
    """
    describes_itself = hasattr(module, "sharded_state_dict") and getattr(module, "tp_group", None) is not None
    if describes_itself:
        own: Any = module
        _name_group(own, groups)
        metadata = {"dp_cp_group": groups.dp_cp} | ({} if alike else {"non_homogeneous_layers": True})
        return own.sharded_state_dict(prefix=prefix, metadata=metadata)
    tensors: dict[str, Any] = {}
    module._save_to_state_dict(tensors, "", keep_vars=True)
    split = {
        name: tensor.partition_dim
        for name, tensor in tensors.items()
        if getattr(tensor, "tensor_model_parallel", False)
    }
    state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        tensors, prefix, split, (), tp_group=groups.tp, dp_cp_group=groups.dp_cp
    )
    for name, child in module.named_children():
        state |= tower_state(child, groups, f"{prefix}{name}.", alike=alike)
    return state


def _name_group(module: torch.nn.Module, groups: ProcessGroupCollection) -> None:
    """Give the parts of a module that have no tensor parallel group of their own its grid's.

    Where they lack one, megatron-core asks its globals when they describe themselves (transformer/module.py
    sharded_state_dict). Remove when every module has one.
    """
    for part in module.modules():
        if hasattr(part, "sharded_state_dict") and not hasattr(part, "tp_group"):
            setattr(part, "tp_group", groups.tp)  # noqa: B010  torch types attributes of a module as parameters


def training_state(training: Training, world: World, *, optimizer: bool, loading: bool = False) -> dict[str, Any]:
    """Sharded state of everything that changes while training. Collective."""
    if not loading:
        gather_parameters([*training.chunks, *([] if training.tower is None else [training.tower])])
    state = model_state(world, training.chunks, training.tower)
    if optimizer:
        weights = dict(state)
        state["optimizers"] = {
            component: optimizer_state.sharded(one, weights, loading=loading)
            for component, one in optimizers(training).items()
        }
        optimizer_state.share_common(state["optimizers"], world)
    state["schedule"] = training.schedule.state_dict()
    return state


def optimizers(training: Training) -> dict[str, Any]:
    """megatron-core's optimizers of this rank by what they train."""
    found = {"foundation": training.optimizer, "tower": training.tower_optimizer}
    return {name: one for name, one in found.items() if one is not None}


def random_object(world: World) -> ShardedObject:
    """This worker's random states, one entry per rank."""
    return ShardedObject("random", random_state.capture(world), (world.size,), (world.rank,), replica_id=0)


def restore_model(chunks: Sequence[Any], tower: Any, loaded: dict[str, Any]) -> None:
    """Put loaded weights in place; adapters that were not loaded stay as they begin."""
    for number, chunk in enumerate(chunks):
        _restore(unwrap(chunk), loaded[f"model{number}"])
    if tower is not None:
        _restore(unwrap(tower), loaded["tower"])


def _restore(module: torch.nn.Module, loaded: dict[str, Any]) -> None:
    fresh = {name: tensor for name, tensor in module.state_dict().items() if is_adapter(name)}
    module.load_state_dict(fresh | loaded, strict=True)


def restore_training(training: Training, loaded: dict[str, Any], *, optimizer: bool, schedule: bool) -> None:
    """Put loaded state in place."""
    restore_model(training.chunks, training.tower, loaded)
    for component, one in optimizers(training).items():
        if optimizer:
            optimizer_state.restore(one, loaded["optimizers"][component])
        else:
            one.reload_model_params()
    if schedule:
        training.schedule.load_state_dict(loaded["schedule"])
