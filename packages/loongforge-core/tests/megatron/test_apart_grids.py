"""Ranks of a run whose encoder has some of its own."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from loongforge.core.config.run import ParallelConfig
from loongforge.core.megatron.grids import domains
from loongforge.core.plan.layout import EncoderLayout, Layout
from loongforge.core.testing import run_distributed


def layout(world: int, **sizes: int) -> Layout:
    return Layout.of(ParallelConfig(**sizes), world)


def test_every_copy_of_the_encoder_serves_one_replica() -> None:
    where = layout(10, tensor_model_parallel_size=3, encoder_ranks=4)
    first, second = domains(EncoderLayout(mode="apart", tp=2, dp=2), where)
    assert (first.ranks, second.ranks) == ((0, 1), (2, 3))
    assert (first.replicas, second.replicas) == ((0,), (1,))
    assert first.blocks == second.blocks == 1


def _place(worker: Any, encoder: EncoderLayout, where: Layout) -> dict[str, Any]:
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform import choose

    platform = choose("cpu").platform()
    start_megatron(platform)
    from megatron.core import parallel_state

    from loongforge.core.megatron.groups import join

    with join(where, worker, platform, 1.0, encoder) as world:
        groups = {name: getattr(world.groups, name) for name in ("tp", "pp", "dp", "mp", "embd", "pos_embd", "expt_dp")}
        ranks = {name: None if group is None else dist.get_process_group_ranks(group) for name, group in groups.items()}
        assert not parallel_state.model_parallel_is_initialized()
        return {"foundation": world.holds_foundation, "encodes": world.encodes, **ranks}


def test_stages_behind_an_encoder() -> None:
    parallel = {"pipeline_model_parallel_size": 3, "encoder_ranks": 1}
    encoder, where = EncoderLayout(mode="apart", tp=1, dp=1), layout(4, **parallel)
    tower, first, middle, last = run_distributed(lambda worker: _place(worker, encoder, where), 4)
    assert (tower["foundation"], tower["encodes"], tower["pp"], tower["dp"]) == (False, True, [0], [0])
    for rank, stage in enumerate((first, middle, last), 1):
        assert (stage["foundation"], stage["encodes"]) == (True, False)
        assert stage["pp"] == stage["mp"] == [1, 2, 3]
        assert stage["tp"] == stage["dp"] == stage["expt_dp"] == [rank]
    assert (first["embd"], middle["embd"], last["embd"]) == ([1, 3], None, [1, 3])
    assert (first["pos_embd"], middle["pos_embd"], last["pos_embd"]) == ([1], None, None)


def test_replicas_beside_an_encoder() -> None:
    encoder, where = EncoderLayout(mode="apart", tp=1, dp=2), layout(4, encoder_ranks=2)
    places = run_distributed(lambda worker: _place(worker, encoder, where), 4)
    assert [place["dp"] for place in places] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [place["foundation"] for place in places] == [False, False, True, True]
