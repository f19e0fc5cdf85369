"""Train two tiny steps without one group of substitutions, for every group; run as a script by test_needed.py.

megatron-core is imported once; every case is a fork. Prints one JSON object: case -> the last megatron-core line of the
traceback and the error, or null when the steps ran.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from loongforge.core import plugins
from loongforge.core.config.run import (
    ComponentConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from loongforge.core.env import Worker
from loongforge.core.model.geometry import ExpertGeometry, TransformerGeometry
from loongforge.core.plan import Plan
from loongforge.core.platform import choose
from loongforge.core.platform.substitution import ORIGINAL, Substitution

GEOMETRY = TransformerGeometry(
    num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, kv_channels=4,
    vocab_size=29, max_position_embeddings=16, norm_epsilon=1e-6, rotary_base=10000.0, tie_word_embeddings=True,
    qk_layernorm=True, attention_dropout=0.1, hidden_dropout=0.1,
)  # fmt: skip


class Tiny:
    """Stands for a family's config, and for the family itself."""

    def __init__(self, geometry: TransformerGeometry = GEOMETRY) -> None:
        self.sizes = geometry

    def geometry(self) -> TransformerGeometry:
        return self.sizes

    def build(self) -> Any:
        from loongforge.core.megatron.language_model import LanguageModel

        return lambda config, context: LanguageModel(config.geometry(), context)


def plain() -> RunConfig:
    return RunConfig(
        model=ModelConfig(foundation=ComponentConfig(family="tiny", geometry=Tiny())),
        train=TrainConfig(train_iters=2, seq_length=8, micro_batch_size=1, global_batch_size=2, precision="fp32"),
        optimizer=OptimizerConfig(lr=1e-3),
        parallel=ParallelConfig(recompute_granularity="selective", recompute_modules=("layernorm", "core_attn")),
    )


def sharded() -> RunConfig:
    config = plain()
    return replace(
        config,
        train=replace(config.train, precision="bf16"),
        parallel=ParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True,
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1,
        ),
    )  # fmt: skip


def staged() -> RunConfig:
    return replace(plain(), parallel=ParallelConfig(pipeline_model_parallel_size=2))


def spread() -> RunConfig:
    config = plain()
    experts = replace(GEOMETRY, experts=ExpertGeometry(num_experts=4, topk=2, ffn_hidden_size=8))
    return replace(
        config,
        model=ModelConfig(foundation=ComponentConfig(family="tiny", geometry=Tiny(experts))),
        parallel=ParallelConfig(expert_model_parallel_size=2),
    )


def train(config: RunConfig, platform: Any, worker: Worker) -> list[float]:
    """Two steps as this worker; their losses."""
    from loongforge.core.megatron.groups import join
    from loongforge.core.model.build import build_model
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import build_training

    plan = Plan.of(config, worker.world_size)
    with join(plan.layout, worker, platform, 1.0) as world:
        training = build_training(plan, world, build_model(plan, world))
        generator = torch.Generator().manual_seed(0)
        batch = {
            "tokens": torch.randint(29, (1, 8), generator=generator),
            "labels": torch.randint(29, (1, 8), generator=generator),
            "loss_mask": torch.ones(1, 8),
            "position_ids": torch.arange(8)[None],
            "sample_ids": torch.tensor([0]),
        }
        return [train_step(plan, world, training, [batch, batch], step).loss for step in range(2)]


def bridge(worker: Worker, platform: Any) -> None:
    """Two grids of one rank each, and what carries features from one to the other."""
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator

    from loongforge.core.megatron.groups import join
    from loongforge.core.plan.layout import Layout

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # without a device NCCL says so there, and ends the process
    config = staged()
    with join(Layout.of(config.parallel, 2), worker, platform, 1.0):
        sides = [HyperCommGrid([1, 1, 1, 1], ["tp", "cp", "pp", "dp"], rank_offset=offset) for offset in range(2)]
        made = BridgeCommunicator(sides[0], sides[1], tensor_ndim=2)
        if worker.rank == 0:
            made.send_forward(torch.ones(3, 2))
        else:
            assert torch.equal(made.recv_forward(), torch.ones(3, 2))


def remove(substitutions: Iterable[Substitution]) -> None:
    """Put back what stood there before."""
    for substitution in substitutions:
        original = getattr(getattr(substitution.owner, substitution.name), ORIGINAL)
        if original is None:
            delattr(substitution.owner, substitution.name)
        else:
            setattr(substitution.owner, substitution.name, original)


def outcome(case: Callable[[], Any]) -> dict[str, str] | None:
    """Run in a fork; where and how it failed."""
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        answer: dict[str, str] | None = None
        try:
            case()
        except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
            places = re.findall(r"/megatron/core/(\S+\.py)", traceback.format_exc())
            answer = {"place": (places or [""])[-1], "error": f"{type(error).__name__}: {error}"[-300:]}
        os.write(send, json.dumps(answer).encode()[:4000])
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


def main() -> None:
    """Every group in turn, and once with all of them."""
    from loongforge.core.megatron.start import start_megatron

    torch.set_num_threads(1)
    platform = choose("cpu").platform()
    start_megatron(platform)
    import loongforge.core.megatron.groups
    import loongforge.core.megatron.language_model
    import loongforge.core.model.build
    import loongforge.core.step.forward
    import loongforge.core.step.optimizer  # noqa: F401
    from loongforge.core.megatron import repairs
    from loongforge.core.platform import cpu_random, cpu_runtime
    from loongforge.core.testing import run_distributed

    load = plugins.load
    plugins.load = lambda kind, name: Tiny() if kind == "models" else load(kind, name)
    upstream = cpu_random.substitutions()
    dispatch = tuple(one for one in upstream if one.name == "maybe_move_tensor_to_cpu")
    groups: dict[str, tuple[Substitution, ...]] = {
        "nothing": (),
        **cpu_runtime.GROUPS,
        "mcore random": tuple(one for one in upstream if one not in dispatch),
        "mcore dispatch": dispatch,
        "repairs": repairs.repairs(),
    }
    alone = Worker(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="single")

    def without(substitutions: tuple[Substitution, ...]) -> None:
        remove(substitutions)
        for config in (plain(), sharded()):
            losses = train(config, platform, alone)
            assert all(loss == loss for loss in losses), losses
        for config in (staged(), spread()):
            run_distributed(lambda worker, config=config: train(config, platform, worker), 2, timeout=120.0)
        run_distributed(lambda worker: bridge(worker, platform), 2, timeout=120.0)

    found = {name: outcome(lambda group=group: without(group)) for name, group in groups.items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
