"""What is frozen stays, bit for bit; what is not learns, at its component's rate; patterns mean the same everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import parity_run as run
import pytest
from parity_run import PP2, TP2_SP, ZERO1

from loongforge.core.config.run import RunConfig
from loongforge.core.errors import PlanError
from loongforge.core.plan import Plan

FLAGS = ["--lr", "1e-2", "--min-lr", "1e-2", "--weight-decay", "0.1"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
VPP2 = [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]
LAYOUTS = {
    "one": ([], 1), "tp2-sp": (TP2_SP, 2), "zero1": (ZERO1, 2), "pp2": (PP2, 2), "vpp2": (VPP2, 2),
    "recompute": (FULL, 1),
}  # fmt: skip
PATTERNS = (r"^embedding\.", r"decoder\.layers\.2\.mlp\.", "q_layernorm")


def frozen(name: str) -> bool:
    """Whether `PATTERNS` freeze this tensor of a tied Qwen3."""
    return name == "model.embed_tokens.weight" or ".layers.2.mlp." in name or "q_norm" in name


def batches(steps: int = 2) -> list[list[run.Batch]]:
    return [[run.random_batch(1, 32, 4 * step + row) for row in range(4)] for step in range(steps)]


def freezing(config: RunConfig, *patterns: str, lr_mult: float = 1.0) -> RunConfig:
    foundation = replace(config.model.foundation, lr_mult=lr_mult)
    return replace(config, model=replace(config.model, freeze_parameters=patterns, foundation=foundation))


def counts(part: Any, training: Any) -> tuple[int, int]:
    return sum(one.trained for one in part.model.parts), sum(one.total for one in part.model.parts)


@pytest.fixture(scope="module")
def one(megatron: Any, qwen3_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> run.Result:
    config = freezing(run.config_of(qwen3_tied, FLAGS), *PATTERNS)
    return run.steps(config, 1, batches(), tmp_path_factory.mktemp("one"), counts)


def test_counts(one: run.Result, qwen3_tied: Path) -> None:
    before = run.read(qwen3_tied)
    total = sum(tensor.numel() for tensor in before.values())
    trained = sum(tensor.numel() for name, tensor in before.items() if not frozen(name))
    assert one.extra == [(trained, total)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_stays_and_the_rest_moves(
    layout: str, megatron: Any, qwen3_tied: Path, one: run.Result, tmp_path: Path
) -> None:
    flags, world = LAYOUTS[layout]
    config = freezing(run.config_of(qwen3_tied, [*flags, *FLAGS]), *PATTERNS)
    found = run.steps(config, world, batches(), tmp_path, counts)
    padding = (1, 48) if layout == "tp2-sp" else (0, 0)  # one row pads the vocabulary of 131, frozen with the embedding
    trained, total = one.extra[0]
    assert found.extra == [(trained, total + padding[0] * padding[1])] * world
    for name, before in run.read(qwen3_tied).items():
        moved = float((found.tensors[name] - before).abs().max())
        assert (moved == 0.0) == frozen(name), (name, moved)
    assert found.losses == pytest.approx(one.losses, rel=1e-4)
    assert found.norms == pytest.approx(one.norms, rel=1e-3)


def refusal(config: RunConfig, world: int) -> str:
    """The message with which every rank refuses to build."""
    from loongforge.ckpt.workers import part_of
    from loongforge.core.errors import ConfigError
    from loongforge.core.testing import run_distributed

    def build(worker: Any) -> str:
        with pytest.raises(ConfigError) as caught, part_of(config):
            pass
        return str(caught.value)

    said = set(run_distributed(build, world))
    assert len(said) == 1, said
    return said.pop()


@pytest.mark.parametrize(("flags", "world"), [([], 1), (PP2, 2)], ids=["one", "pp2"])
def test_mistakes_are_refused_by_all_ranks_alike(flags: list[str], world: int, megatron: Any, qwen3_tied: Path) -> None:
    config = run.config_of(qwen3_tied, [*flags, *FLAGS])
    idle = refusal(freezing(config, "q_layernorm", "vision"), world)
    assert "'vision' matches no parameter" in idle
    assert "q_layernorm'" not in idle
    assert "nothing to train" in refusal(freezing(config, ".*"), world)
    assert "'(' is not a regular expression" in refusal(freezing(config, "("), world)


def test_a_frozen_component_is_refused_before_any_process_starts(qwen3_tied: Path) -> None:
    config = run.config_of(qwen3_tied, FLAGS)
    foundation = replace(config.model.foundation, freeze=True)
    with pytest.raises(PlanError, match="leaves nothing to train"):
        Plan.of(replace(config, model=replace(config.model, foundation=foundation)), 1)


@pytest.mark.parametrize("layout", ["one"])
def test_a_frozen_component_runs_at_rate_0(layout: str, megatron: Any, qwen3_tied: Path, tmp_path: Path) -> None:
    flags, world = LAYOUTS[layout]
    config = run.config_of(qwen3_tied, [*flags, "--lr", "0", "--min-lr", "0"])
    foundation = replace(config.model.foundation, freeze=True)
    config = replace(config, model=replace(config.model, foundation=foundation))
    found = run.steps(config, world, batches(), tmp_path)
    assert found.norms == [0.0, 0.0]
    assert run.worst(found.tensors, run.read(qwen3_tied))[0] == 0.0


@pytest.mark.parametrize("layout", ["one", "zero1"])
def test_lr_mult_scales_the_rate(layout: str, megatron: Any, qwen3_tied: Path, tmp_path: Path) -> None:
    """Half the rate with lr_mult 2 is the same run, in the same two groups of weight decay."""
    flags, world = LAYOUTS[layout]

    def rates(part: Any, training: Any) -> list[tuple[float, float]]:
        return sorted({(group["lr"], group["weight_decay"]) for group in training.optimizer.param_groups})

    usual = run.config_of(qwen3_tied, [*flags, *FLAGS])
    halved = run.config_of(qwen3_tied, [*flags, *FLAGS, "--lr", "5e-3", "--min-lr", "5e-3"])
    expected = run.steps(usual, world, batches(), tmp_path / "usual", rates)
    found = run.steps(freezing(halved, lr_mult=2.0), world, batches(), tmp_path / "halved", rates)
    assert expected.extra[0] == [(0.01, 0.0), (0.01, 0.1)]
    assert found.extra == expected.extra
    assert found.losses == expected.losses
    assert run.worst(found.tensors, expected.tensors)[0] == 0.0
