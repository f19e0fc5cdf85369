"""Which layers a stage holds: as megatron-core builds them, complete, and refused where it would assert."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from plan_tiny import run

from loongforge.core.errors import PlanError
from loongforge.core.megatron.start import start_megatron
from loongforge.core.plan import Plan
from loongforge.core.plan.layout import Layout
from loongforge.core.plan.stages import stage_chunks, stage_sizes
from loongforge.core.platform import choose

FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"


def layout(pp: int, vpp: int | None, first: int | None, last: int | None) -> Layout:
    return Layout(
        world=pp, tp=1, cp=1, dp=1, pp=pp, vpp=vpp, ep=1, etp=1, sp=False, first_layers=first, last_layers=last
    )


def upstream(layers: int, shape: Layout, stage: int) -> list[range]:
    """What megatron-core's own functions say."""
    start_megatron(choose("cpu").platform())
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    options: Any = SimpleNamespace(
        num_layers=layers, pipeline_model_parallel_size=shape.pp, pipeline_model_parallel_layout=None,
        virtual_pipeline_model_parallel_size=shape.vpp, num_layers_in_first_pipeline_stage=shape.first_layers,
        num_layers_in_last_pipeline_stage=shape.last_layers, account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )  # fmt: skip
    found = []
    for chunk in range(shape.num_chunks):
        number = None if shape.vpp is None else chunk
        start = get_transformer_layer_offset(options, vp_stage=number, pp_rank=stage)
        found.append(range(start, start + get_num_layers_to_build(options, vp_stage=number, pp_rank=stage)))
    return found


@pytest.mark.parametrize(
    ("layers", "pp", "vpp", "first", "last"),
    [(12, 3, None, None, None), (12, 3, 2, None, None), (61, 4, None, None, 16), (61, 4, None, 13, None),
     (61, 16, None, None, 1), (11, 4, None, 2, 3), (4, 2, None, 1, 3), (4, 2, None, 1, None), (20, 4, 2, 2, 6),
     (16, 3, 2, 4, None), (22, 4, 2, None, 4)],
)  # fmt: skip
def test_stages_are_those_that_are_built(
    layers: int, pp: int, vpp: int | None, first: int | None, last: int | None
) -> None:
    shape = layout(pp, vpp, first, last)
    chunks = [stage_chunks(layers, shape, stage) for stage in range(pp)]
    assert [list(one) for one in chunks] == [upstream(layers, shape, stage) for stage in range(pp)]
    held = [number for one in chunks for chunk in one for number in chunk]
    assert sorted(held) == list(range(layers))
    assert sum(stage_sizes(layers, shape)) == layers


def planned(**parallel: Any) -> Plan:
    return Plan.of(run(**{"num_layers": 4, "pipeline_model_parallel_size": 2, **parallel}), 2)


def test_what_cannot_be_shared_out_is_refused() -> None:
    for values, said in (
        ({FIRST: 4}, "leave 0 of 4 layers for 1 other stages"),
        ({FIRST: 1, LAST: 2}, "leave 1 of 4 layers for 0 other stages"),
        ({FIRST: 1, "virtual_pipeline_model_parallel_size": 3}, "a stage of 1 layers cannot be 3 equal virtual stages"),
    ):
        with pytest.raises(PlanError, match=said):
            planned(**values)
    with pytest.raises(PlanError, match="pipeline_model_parallel_size=1: leave them out"):
        Plan.of(run(**{FIRST: 1}), 1)


def test_the_remedy_named_is_legal() -> None:
    for pp, last in product((2, 4), (None, 1, 2)):
        values = {"pipeline_model_parallel_size": pp, **({} if last is None else {LAST: last})}
        try:
            Plan.of(run(num_layers=7, **values), pp)
        except PlanError as error:
            if "for example" not in str(error):
                continue
            name, size = str(error).rstrip(".").rpartition(" ")[2].removeprefix("parallel.").split("=")
            assert Plan.of(run(**{"num_layers": 7, **values, name: int(size)}), pp)


def test_the_larger_stage_is_the_fuller_one() -> None:
    from loongforge.core.plan import stage_parameters

    plan = planned(**{FIRST: 1})
    first, last = stage_parameters(plan.geometry, plan.padded_vocab_size, plan.layout)
    even = planned()
    halves = stage_parameters(even.geometry, even.padded_vocab_size, even.layout)
    assert first < halves[0]
    assert last > halves[1]
    assert first + last == sum(halves)
    assert plan.layers_per_chunk == 3
