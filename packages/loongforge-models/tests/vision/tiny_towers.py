"""Tiny vision encoders: transformers' with random weights, ours with the same ones, and every gradient of both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from loongforge.core.config.run import ComponentConfig, ComponentParallel, ModelConfig, RunConfig, TrainConfig
from loongforge.core.env import Worker
from loongforge.core.model.weights import Copy, FuseGateUp, Rule, SplitQKV, WeightTable
from loongforge.core.plan.layout import EncoderLayout, Layout
from loongforge.models.vision.qwen2_5_vit.config import Qwen2_5VitConfig
from loongforge.models.vision.qwen3_vit.config import Qwen3VitConfig
from loongforge.models.vision.qwen_mlp_adapter.config import QwenMlpAdapterConfig

OUTPUT = 20
"""Width of the foundation."""

GRID = [(1, 6, 10), (3, 4, 6), (1, 2, 2), (1, 10, 4), (2, 4, 6)]
"""Images and videos; frames of unequal and of equal size, none a multiple of the window of 4 x 4 patches."""

QWEN3 = Qwen3VitConfig(
    num_layers=4, hidden_size=48, ffn_hidden_size=84, num_attention_heads=4, patch_size=5, temporal_patch_size=3,
    position_embeddings=49, deepstack_layers=(0, 2),
)  # fmt: skip
QWEN2_5 = Qwen2_5VitConfig(
    num_layers=3, hidden_size=48, ffn_hidden_size=84, num_attention_heads=4, patch_size=5, temporal_patch_size=3,
    window_size=20, full_attention_layers=(1,),
)  # fmt: skip
ADAPTERS = {
    "qwen3_vit": QwenMlpAdapterConfig(),
    "qwen2_5_vit": QwenMlpAdapterConfig(normalization="RMSNorm"),
}
CONFIGS: dict[str, Any] = {"qwen3_vit": QWEN3, "qwen2_5_vit": QWEN2_5}


def family(name: str, what: str) -> Any:
    """`build` or `weights` of one of the three families."""
    from importlib import import_module

    module = "weights" if what == "weights" else "model"
    return getattr(import_module(f"loongforge.models.vision.{name}.{module}"), what)


def theirs(name: str) -> Any:
    """transformers' tower with random norms, biases and matrices; the same in every process."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    values = {**CONFIGS[name].to_hf(), **QwenMlpAdapterConfig(output_size=OUTPUT).to_hf()}
    values.pop("model_type")
    if name == "qwen3_vit":
        model: Any = Qwen3VLVisionModel(Qwen3VLVisionConfig(**values))
    else:
        model = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**values))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.dim() == 1 and parameter.mean() == 1 else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.float().train()


def pixels(name: str, grid: list[tuple[int, int, int]]) -> torch.Tensor:
    """Random patches fp32 `[P, patch_dim]`."""
    patches = sum(t * h * w for t, h, w in grid)
    generator = torch.Generator().manual_seed(11)
    return torch.randn(patches, CONFIGS[name].geometry().patch_dim, generator=generator)


def scalar(features: torch.Tensor) -> torch.Tensor:
    """A loss that asks something else of every number of `[features, 1 + levels, H]`."""
    generator = torch.Generator().manual_seed(13)
    return (features * torch.randn(features.shape, generator=generator)).sum()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """transformers' answer."""

    features: torch.Tensor
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def reference(name: str, grid: list[tuple[int, int, int]]) -> Reference:
    """Features of all levels, weights and gradients under transformers' names."""
    model = theirs(name)
    output = model(pixels(name, grid), torch.tensor(grid))
    levels = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    features = torch.stack(levels, 1)
    scalar(features).backward()
    return Reference(
        features=features.detach(),
        weights={key: value.detach() for key, value in model.named_parameters()},
        gradients={key: value.grad for key, value in model.named_parameters()},
    )


def in_megatron(tables: list[WeightTable], hf: dict[str, torch.Tensor], tp: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Every tensor of transformers by megatron-core name, cut for tensor parallel (rank, size)."""
    found: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for table in tables:
        for rule in table.rules:
            for names, number in matches(rule, hf):
                parts = [hf[one] for one in names]
                megatron = re.sub(r"\{\w+\}", number, rule.megatron)
                assert megatron not in found, megatron
                found[megatron] = cut(rule, parts, *tp)
                assert not used & set(names), names
                used |= set(names)
    assert used == set(hf), f"no rule for {sorted(set(hf) - used)}"
    return found


def hf_names(rule: Rule) -> tuple[str, ...]:
    """Names on Hugging Face's side, with their braces."""
    match rule:
        case FuseGateUp():
            return rule.gate, rule.up
        case Copy() | SplitQKV():
            return (rule.hf,)
    raise AssertionError(rule)


def matches(rule: Rule, hf: dict[str, torch.Tensor]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Names and number of every place that the rule fits."""
    names = hf_names(rule)
    pattern = re.compile(re.sub(r"\\\{\w+\\\}", r"(\\d+)", re.escape(names[0])))
    for key in hf:
        if match := pattern.fullmatch(key):
            number = match[1] if match.groups() else ""
            yield tuple(re.sub(r"\{\w+\}", number, one) for one in names), number


def cut(rule: Rule, parts: list[torch.Tensor], rank: int, size: int) -> torch.Tensor:
    """One megatron-core tensor of one tensor parallel rank."""
    match rule:
        case Copy():
            return parts[0] if rule.shard_dim is None else parts[0].chunk(size, rule.shard_dim)[rank]
        case FuseGateUp():
            return torch.cat([part.chunk(size)[rank] for part in parts])
        case SplitQKV():
            fused = parts[0].unflatten(0, (3, rule.num_attention_heads, rule.kv_channels))
            return fused.transpose(0, 1).flatten(0, 2).chunk(size)[rank]
    raise AssertionError(rule)


@contextmanager
def towers(
    worker: Worker, name: str, tp: int, initialise: bool = False, precision: Any = "fp32", **parallel: Any
) -> Iterator[tuple[Any, Any]]:
    """Our encoder and projector; the foundation's ranks are data parallel, so its groups are others."""
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform import choose

    platform = choose("cpu").platform()
    start_megatron(platform)  # before anything that imports megatron-core
    from loongforge.core.megatron.groups import join
    from loongforge.core.megatron.specs import layers_for
    from loongforge.core.megatron.transformer_config import compute_type
    from loongforge.core.model.contract import TowerContext

    world = worker.world_size
    layout = Layout(world=world, tp=1, cp=1, dp=world, pp=1, vpp=None, ep=1, etp=1, sp=False)
    encoder = EncoderLayout(mode="inline", tp=tp, dp=world // tp)
    with join(layout, worker, platform, 3, encoder) as joined:
        run = RunConfig(
            model=ModelConfig(foundation=ComponentConfig(family="", geometry=None)),
            train=TrainConfig(precision=precision, seed=3),
        )
        assert joined.encoder_groups is not None
        context = TowerContext(
            run=run,
            component=ComponentConfig(family=name, geometry=CONFIGS[name], parallel=ComponentParallel(**parallel)),
            groups=joined.encoder_groups,
            layers=layers_for(platform, compute_type(run.train)),
            initialise=initialise,
            encoder=CONFIGS[name].geometry(),
            output_size=OUTPUT,
        )
        yield (
            family(name, "build")(CONFIGS[name], context),
            family("qwen_mlp_adapter", "build")(ADAPTERS[name], context),
        )


def tables(name: str) -> list[WeightTable]:
    """Of the encoder and of its projector."""
    return [family(name, "weights")(CONFIGS[name]), family("qwen_mlp_adapter", "weights")(ADAPTERS[name])]


def named(encoder: Any, projector: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters of both; no name is in both."""
    found = dict(encoder.named_parameters())
    assert not found.keys() & dict(projector.named_parameters()).keys()
    return found | dict(projector.named_parameters())


def fill(parameters: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    """Set every parameter; both sides have the same names and shapes."""
    assert parameters.keys() == values.keys(), sorted(parameters.keys() ^ values.keys())
    with torch.no_grad():
        for key, parameter in parameters.items():
            assert parameter.shape == values[key].shape, key
            parameter.copy_(values[key])


def differences(
    worker: Worker, name: str, tp: int, grid: list[tuple[int, int, int]], **parallel: Any
) -> dict[str, float]:
    """Largest difference of the features (key `features`) and of every gradient, relative to the largest value."""
    right = reference(name, grid)
    with towers(worker, name, tp, **parallel) as (encoder, projector):
        place = (worker.rank % tp, tp)
        parameters = named(encoder, projector)
        fill(parameters, in_megatron(tables(name), right.weights, place))
        encoder.train(), projector.train()
        features = projector(encoder(pixels(name, grid), grid), grid)
        scalar(features).backward()
        gradients = in_megatron(tables(name), right.gradients, place)
        found = {"features": relative(features.detach(), right.features)}
        for key, parameter in parameters.items():
            assert parameter.grad is not None, f"{key} has no gradient"
            found[key] = relative(parameter.grad, gradients[key])
        return found


def relative(ours: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    assert ours.shape == right.shape, (ours.shape, right.shape)
    return ((ours - right).abs().max() / right.abs().max()).item()


def import_heavy() -> None:
    """What forked workers would each import again."""
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform import choose

    start_megatron(choose("cpu").platform())
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
    import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401
