"""Steps of a model with experts are the same whatever spreads them, the sharded optimizer included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loongforge.core import plugins
from loongforge.core.config.experts import ExpertConfig
from loongforge.core.config.run import (
    ComponentConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from loongforge.core.testing import run_distributed

STEPS = 3
SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "ep2": (2, ParallelConfig(expert_model_parallel_size=2)),
    "ep2 sharded": (2, ParallelConfig(expert_model_parallel_size=2, **SHARDED)),
    "tp2 ep2 sharded": (
        4,
        ParallelConfig(
            tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2,
            expert_tensor_parallel_size=1, use_distributed_optimizer=True,
        ),
    ),
}  # fmt: skip


class Family:
    """Stands for a family's config, and for the family itself."""

    role = "foundation"

    def __init__(self, sizes: Any) -> None:
        self.sizes = sizes

    def geometry(self) -> Any:
        return self.sizes

    def build(self) -> Any:
        from loongforge.core.megatron.language_model import build_language_model

        return lambda config, context: build_language_model(config.geometry(), context)


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    """DeepSeek's blocks with a balance loss, and random weights."""
    plain = tiny.deepseek3()
    geometry = replace(plain, experts=replace(plain.experts, aux_loss_coeff=0.01))
    return geometry, tiny.reference_gradients(geometry)[1]


def steps(
    worker: Any, tiny: Any, model: Any, parallel: ParallelConfig, moe: ExpertConfig | None = None
) -> tuple[list[tuple[float, ...]], Any]:
    """Loss, gradient norm and balance loss of every step, and the number of parameters."""
    from loongforge.core.megatron.groups import join
    from loongforge.core.model.build import build_model
    from loongforge.core.plan import Plan
    from loongforge.core.platform import choose
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import build_training

    geometry, weights = model
    config = RunConfig(
        model=ModelConfig(foundation=ComponentConfig(family="tiny", geometry=Family(geometry))),
        train=TrainConfig(train_iters=STEPS, seq_length=tiny.LENGTH, global_batch_size=tiny.SAMPLES, precision="fp32"),
        optimizer=OptimizerConfig(lr=1e-3),
        parallel=parallel,
        moe=moe or ExpertConfig(),
    )
    plan = Plan.of(config, worker.world_size)
    with join(plan.layout, worker, choose("cpu").platform(), 1.0) as world:
        built = build_model(plan, world)
        kinds = {type(one).__name__ for one in built.chunks[0].modules()}
        assert ("GroupedExperts" in kinds) == bool(config.moe.moe_grouped_gemm)
        tiny.load(built.chunks[0], world, weights)
        training = build_training(plan, world, built)
        batch = tiny.batch()
        batch["position_ids"] = torch.arange(tiny.LENGTH).expand(tiny.SAMPLES, -1)
        batch["sample_ids"] = torch.arange(tiny.SAMPLES)
        mine = {name: one.chunk(world.dp.size())[world.dp.rank()] for name, one in batch.items()}
        rows = [{name: one[[n]] for name, one in mine.items()} for n in range(len(mine["tokens"]))]
        results = [train_step(plan, world, training, rows, step) for step in range(STEPS)]
        measured = [(one.loss, one.grad_norm, one.extra["load_balancing_loss"]) for one in results]
        return measured, sum(part.total for part in built.parts)


@pytest.mark.parametrize(("name", "grouped"), [*((name, False) for name in LAYOUTS), ("ep2 sharded", True)])
def test_steps_equal_one_process(
    name: str, grouped: bool, tiny: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loongforge.core.model.build
    import loongforge.core.step.forward
    import loongforge.core.step.optimizer  # noqa: F401  inherited by the forks

    load = plugins.load
    monkeypatch.setattr(plugins, "load", lambda kind, name: Family(None) if kind == "models" else load(kind, name))
    world, parallel = LAYOUTS[name]
    (expected, size), *_ = run_distributed(lambda worker: steps(worker, tiny, model, ParallelConfig()), 1)
    assert expected[-1][0] < expected[0][0]
    moe = ExpertConfig(moe_grouped_gemm=grouped)
    for found, total in run_distributed(lambda worker: steps(worker, tiny, model, parallel, moe), world):
        # Measured: 1e-7.
        assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
        assert total == size
