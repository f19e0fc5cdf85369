"""Options that change memory or time must not change the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import parity_run as run
import pytest
from parity_run import CP2, PP2, TP2_SP, ZERO1

from loongforge.core.testing import fp32_tolerance

FLAGS = ["--lr", "1e-3", "--min-lr", "1e-3"]


def selective(*modules: str) -> list[str]:
    return ["--recompute-granularity", "selective", "--recompute-modules", *modules]


FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
BLOCK = ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "2"]
ONE_RANK = {
    "core_attn": selective("core_attn"),
    "layernorm": selective("layernorm"),
    "mlp": selective("mlp"),
    "all-three": selective("core_attn", "layernorm", "mlp"),
    "full-uniform": FULL,
    "full-block": BLOCK,
    "zero1-alone": ZERO1,
}
TWO_RANKS = {
    "overlap-reduce": ["--overlap-grad-reduce"],
    "small-buckets": ["--overlap-grad-reduce", "--ddp-bucket-size", "2000"],
    "zero1": ["--use-distributed-optimizer"],
    "zero1-overlap": ZERO1,
    "zero1-buckets": [*ZERO1, "--ddp-bucket-size", "2000"],
}
FOUR_RANKS = {
    "pp2-zero1-no-overlap": [*PP2, "--use-distributed-optimizer"],
    "vpp2-zero1": [*PP2, "--num-virtual-stages-per-pipeline-rank", "2", *ZERO1],
    "tp2-sp-zero1": [*TP2_SP, *ZERO1],
    "cp2-zero1": [*CP2, *ZERO1],
}


def batches() -> list[list[run.Batch]]:
    return [[run.random_batch(1, 32, 4 * step + row) for row in range(4)] for step in range(2)]


def train(directory: Path, flags: list[str], world: int, scratch: Path, dropout: float = 0.0) -> run.Result:
    config = run.config_of(directory, [*flags, *FLAGS])
    if dropout:
        foundation = config.model.foundation
        geometry = replace(foundation.geometry, attention_dropout=dropout)
        config = replace(config, model=replace(config.model, foundation=replace(foundation, geometry=geometry)))
    return run.steps(config, world, batches(), scratch)


def same(left: run.Result, right: run.Result) -> None:
    assert left.losses == pytest.approx(right.losses, rel=fp32_tolerance(1e-6))
    assert left.norms == pytest.approx(right.norms, rel=fp32_tolerance(1e-5))
    # Adam divides by the root of the squared gradient: an entry near 0 may move by a part of lr = 1e-3 either way.
    for name, tensor in right.tensors.items():
        moved = (left.tensors[name] - tensor).abs()
        assert moved.mean() < 1e-6, (name, moved.mean())


@pytest.fixture(scope="module")
def one(megatron: Any, qwen3_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> run.Result:
    """Four micro-batches accumulated on one rank, nothing recomputed."""
    return train(qwen3_tied, [], 1, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", ONE_RANK)
def test_on_one_rank(name: str, megatron: Any, qwen3_tied: Path, one: run.Result, tmp_path: Path) -> None:
    same(train(qwen3_tied, ONE_RANK[name], 1, tmp_path), one)


@pytest.mark.parametrize("name", TWO_RANKS)
def test_on_two_ranks(name: str, megatron: Any, qwen3_tied: Path, one: run.Result, tmp_path: Path) -> None:
    same(train(qwen3_tied, TWO_RANKS[name], 2, tmp_path), one)


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_on_four_ranks(name: str, megatron: Any, qwen3_tied: Path, one: run.Result, tmp_path: Path) -> None:
    same(train(qwen3_tied, FOUR_RANKS[name], 4, tmp_path), one)


def test_stages_gather_parameters_while_computing(
    megatron: Any, qwen3_tied: Path, one: run.Result, tmp_path: Path
) -> None:
    same(train(qwen3_tied, [*PP2, *ZERO1], 4, tmp_path), one)


def test_accumulating_is_a_larger_micro_batch(megatron: Any, qwen3_tied: Path, one: run.Result, tmp_path: Path) -> None:
    import torch

    whole = [[{name: torch.cat([batch[name] for batch in step]) for name in step[0]}] for step in batches()]
    same(run.steps(run.config_of(qwen3_tied, FLAGS, mbs=4), 1, whole, tmp_path), one)


@pytest.mark.parametrize(("flags", "world"), [([], 1), (TP2_SP, 2), (TP2_SP[:2], 2)], ids=["one", "tp2-sp", "tp2"])
def test_recomputing_draws_the_same_dropout(
    flags: list[str], world: int, megatron: Any, qwen3_tied: Path, one: run.Result, tmp_path: Path
) -> None:
    kept = train(qwen3_tied, flags, world, tmp_path / "kept", dropout=0.3)
    again = train(qwen3_tied, [*flags, *FULL], world, tmp_path / "again", dropout=0.3)
    same(again, kept)
    assert abs(kept.losses[0] - one.losses[0]) > 1e-4, "there was no dropout"


@pytest.mark.parametrize("module", ["mla_up_proj", "moe_act"])
def test_modules_of_other_models_are_refused(module: str, qwen3_tied: Path) -> None:
    from loongforge.core.errors import PlanError
    from loongforge.core.plan import Plan

    with pytest.raises(PlanError, match=f"{module}.*cannot be recomputed in a dense model"):
        Plan.of(run.config_of(qwen3_tied, selective(module)), 1)
