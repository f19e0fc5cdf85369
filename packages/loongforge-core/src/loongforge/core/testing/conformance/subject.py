"""The tiny models of a family, and one worker's part of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from loongforge.core import env, plugins
from loongforge.core.checkpoint.contract import WeightMove, WeightPart
from loongforge.core.config.run import (
    CheckpointConfig,
    ComponentConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from loongforge.core.megatron.groups import World, join
from loongforge.core.model.build import build_model
from loongforge.core.model.weights import WeightTable
from loongforge.core.plan import Plan
from loongforge.core.plan.parameters import count_parameters
from loongforge.core.platform import choose
from loongforge.core.plugins import FormatSpec, ModelFamily, Plugin
from loongforge.core.testing.conformance.registration import configurations, survives_hf
from loongforge.core.testing.conformance.transformers_side import WEIGHTS

SHRUNK: Mapping[str, Any] = {
    "num_layers": 4,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 131,  # odd: padded at tensor parallel size 2
    "max_position_embeddings": 64,
    "norm_epsilon": 3e-5,  # no default of anybody: a field that is lost on the way shows
    "rotary_base": 5000.0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
"""Fields of `TransformerGeometry` and their tiny values; set where the family's config has a field of that name.

Every dimension differs from every other. Fields that end in `_token_id` take their defaults, for their tokens are gone.
"""

SHRUNK_PARTS: Mapping[str, Any] = {
    "num_experts": 12,  # few enough that each gets a token in a step
    "moe_router_topk": 4,
    # transformers multiplies experts in groups, whose rows must be multiples of 16 bytes: 20 and not 22.
    "moe_ffn_hidden_size": 20,
    "moe_shared_expert_intermediate_size": 40,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_aux_loss_coeff": 0.0,  # transformers leaves it out of the loss unless asked
    "first_dense_layers": 1,
    "q_lora_rank": 28,
    "kv_lora_rank": 12,
    "qk_head_dim": 18,
    "qk_pos_emb_head_dim": 6,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
"""The same for experts, latent attention and delta rules, of which a size may have none: set where it has a value."""

DELTA_EPSILON = 1e-3
"""`norm_epsilon` beside a delta rule: what a head reads is normalised however little it is, or rounding decides."""

STEPS = 4
"""Steps of the resumed run; twice as many for learning."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tiny model: released sizes with tied and untied embeddings are two."""

    label: str
    config: Any
    """The family's config."""
    directory: Path

    @property
    def weights(self) -> Path:
        """Hugging Face directory of random weights that every later check starts from."""
        return self.directory / WEIGHTS


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A family and its tiny models."""

    plugin: Plugin
    cases: tuple[Case, ...]

    @classmethod
    def of(cls, plugin: Plugin, tiny: Mapping[str, Any], directory: Path) -> Subject:
        """Shrink the smallest size; `AssertionError` or `ConfigError` when the family has no such model."""
        if "hf" not in plugins.registered("checkpoints"):
            raise AssertionError("weights move through the checkpoint format 'hf': pip install loongforge-ckpt")
        sizes = [config for _, config in configurations(plugin)]
        smallest = min(sizes, key=lambda one: count_parameters(one.geometry(), one.geometry().vocab_size))
        names = {field.name for field in fields(smallest)}
        if unknown := sorted(set(tiny) - names):
            raise AssertionError(f"tiny: {type(smallest).__name__} has no field {unknown[0]!r}")
        config = replace(smallest, **_shrunk(smallest, names), **_default_tokens(smallest))
        config = replace(config, **tiny)
        tied = sorted({one.geometry().tie_word_embeddings for one in sizes})
        if "tie_word_embeddings" in names and "tie_word_embeddings" not in tiny:
            configs = [replace(config, tie_word_embeddings=value) for value in tied]
        else:
            configs = [config]
        cases: list[Case] = []
        for one in configs:
            label = "tied" if one.geometry().tie_word_embeddings else "untied"
            survives_hf(f"tiny {label} model", one, plugin.spec.hf_architectures)
            cases.append(Case(label=label, config=one, directory=directory / label))
        return cls(plugin=plugin, cases=tuple(cases))

    @property
    def spec(self) -> ModelFamily:
        """The family's registration."""
        return self.plugin.spec

    def describe(self) -> str:
        """The tiny models in words."""
        geometry = self.cases[0].config.geometry()
        size = f"{geometry.num_layers} layers, hidden size {geometry.hidden_size}, {geometry.vocab_size} tokens"
        return f"{size}, embeddings {' and '.join(case.label for case in self.cases)}"

    def run(self, case: Case, parallel: ParallelConfig | None = None, **checkpoint: Any) -> RunConfig:
        """A run of a case: fp32, a step of 4 sequences in micro-batches of 1, mock data."""
        return RunConfig(
            model=ModelConfig(
                foundation=ComponentConfig(
                    family=f"{self.plugin.distribution}:{self.plugin.name}", geometry=case.config
                )
            ),
            parallel=parallel or ParallelConfig(),
            train=TrainConfig(
                train_iters=STEPS, global_batch_size=4, seq_length=32, precision="fp32", deterministic=False
            ),
            optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-2),
            data=DataConfig(source="mock", num_workers=0),
            checkpoint=CheckpointConfig(**checkpoint),
            platform=choose().name,
        )


def _shrunk(smallest: Any, names: set[str]) -> dict[str, Any]:
    values = {name: value for name, value in SHRUNK.items() if name in names}
    values |= {name: value for name, value in SHRUNK_PARTS.items() if getattr(smallest, name, None)}
    return values | ({"norm_epsilon": DELTA_EPSILON} if "linear_num_key_heads" in values else {})


def _default_tokens(config: Any) -> dict[str, Any]:
    return {
        field.name: 0 if field.default is MISSING else field.default
        for field in fields(config)
        if field.name.endswith("_token_id")
    }


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one worker holds of a model."""

    plan: Plan
    world: World
    chunks: list[torch.nn.Module]
    table: WeightTable
    format: FormatSpec
    """The Hugging Face format."""

    def move(self, path: Path) -> WeightMove:
        """Weights between this part and a directory."""
        part = WeightPart(
            component="foundation",
            chunks=self.chunks,
            table=self.table,
            groups=self.world.groups,
            vocab_size=self.plan.geometry.vocab_size,
        )
        return WeightMove(
            path=path,
            parts=(part,),
            world=self.world,
            config=self.plan.config.model.foundation.geometry.to_hf(),
        )

    def load(self, path: Path) -> None:
        """Fill the parameters from a Hugging Face directory."""
        self.format.load()(self.move(path))

    def save(self, path: Path) -> None:
        """Write the parameters as a Hugging Face directory."""
        self.format.save()(self.move(path))

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters of all chunks by name; names are megatron-core's, numbered within a chunk."""
        return {name: parameter for chunk in self.chunks for name, parameter in chunk.named_parameters()}

    def batches(self) -> list[Any]:
        """Micro-batches of the first step."""
        from loongforge.core.checkpoint.start import Start
        from loongforge.core.data.open import open_data

        with open_data(self.plan, self.world, Start()).loader(0) as loader:
            return loader.step()


@contextmanager
def part_of(config: RunConfig, worker: env.Worker) -> Iterator[Part]:
    """Join the other workers and build this one's chunks; everything ends with the block."""
    plan = Plan.of(config, worker.world_size)
    component = config.model.foundation
    family: ModelFamily = plugins.load("models", component.family)
    with join(plan.layout, worker, choose().platform(), 3.0) as world:
        yield Part(
            plan=plan,
            world=world,
            chunks=build_model(plan, world).chunks,
            table=family.weights()(component.geometry),
            format=plugins.load("checkpoints", "hf"),
        )
