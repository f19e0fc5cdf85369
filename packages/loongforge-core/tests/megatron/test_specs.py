"""Which layer stands where in the whole model, whatever chunk builds it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest


def chunks(tiny: Any, *, pp: int, vpp: int | None, deepstack: int, first_dense: int) -> list[list[tuple[str, str]]]:
    """Class and kind of MLP of every layer, by chunk in the order of data."""
    import torch

    from loongforge.core.config.run import ComponentConfig, ModelConfig, RunConfig, TrainConfig
    from loongforge.core.megatron.specs import block_spec, layers_for
    from loongforge.core.megatron.transformer_config import transformer_config
    from loongforge.core.platform import choose

    plain = tiny.qwen3_moe()
    experts = replace(plain.experts, first_dense_layers=first_dense)
    geometry = replace(plain, num_layers=8, experts=experts)
    model = ModelConfig(foundation=ComponentConfig(family="tiny", geometry=geometry))
    run = RunConfig(model=model, train=TrainConfig(train_iters=1))
    layers = layers_for(choose("cpu").platform(), torch.float32)
    where = replace(tiny.layout(pp, pp=pp), vpp=vpp)
    config = transformer_config(geometry, run, where, layers, initialise=False)
    found: list[list[tuple[str, str]]] = []
    for stage in range(vpp or 1):
        for rank in range(pp):
            block = block_spec(config, layers, stage if vpp else None, geometry, deepstack, pp_rank=rank)
            found.append(
                [
                    (spec.module.__name__, "experts" if "MoELayer" in str(spec.submodules.mlp) else "mlp")
                    for spec in block.layer_specs
                ]
            )
    return found


@pytest.mark.parametrize(("pp", "vpp"), [(1, None), (2, None), (4, None), (2, 2)])
def test_layers_are_chosen_by_their_number_in_the_whole_model(pp: int, vpp: int | None, tiny: Any) -> None:
    found = chunks(tiny, pp=pp, vpp=vpp, deepstack=2, first_dense=3)
    assert [len(chunk) for chunk in found] == [8 // (pp * (vpp or 1))] * (pp * (vpp or 1))
    flat = [layer for chunk in found for layer in chunk]
    assert [name for name, _ in flat] == ["DeepstackLayer"] * 2 + ["TransformerLayer"] * 6
    assert [mlp for _, mlp in flat] == ["mlp"] * 3 + ["experts"] * 5


def test_a_model_without_experts_has_none(tiny: Any) -> None:
    found = chunks(tiny, pp=1, vpp=None, deepstack=0, first_dense=8)
    assert {mlp for _, mlp in found[0]} == {"mlp"}


def test_uneven_gathers_choose_the_dispatcher(tiny: Any) -> None:
    import torch

    from loongforge.core.config.experts import ExpertConfig
    from loongforge.core.megatron.experts import expert_options
    from loongforge.core.megatron.specs import layers_for
    from loongforge.core.platform import choose

    geometry = tiny.qwen3_moe()
    layers = layers_for(choose("cpu").platform(), torch.float32)

    def dispatcher(uneven: bool, **sizes: int) -> str:
        own = replace(layers, uneven_gather=uneven)
        options = expert_options(geometry.experts, ExpertConfig(), 2, tiny.layout(**sizes), own)
        return options["moe_token_dispatcher_type"]

    assert dispatcher(False, world=2, tp=2, etp=2) == "allgather"
    assert dispatcher(False, world=2, tp=2, ep=2) == "alltoall"
    assert dispatcher(True, world=2, tp=2, etp=2) == "alltoall"
