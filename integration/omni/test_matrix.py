"""Any encoder goes with any foundation: every pair that is installed is built and trains."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import tiny_sizes
import torch

from loongforge.core import plugins
from loongforge.core.config import families
from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import RunConfig
from loongforge.core.testing import run_distributed

ENCODERS = families.fitting("image_encoder")
FOUNDATIONS = families.fitting("foundation")
COMMON = [
    "--fp32", "--seq-length", "48", "--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "2",
    "--lr", "1e-3", "--weight-decay", "0", "--num-workers", "0", "--training-phase", "sft", "data.source=mock",
    "data.packing=false", "data.min_pixels=64", "data.max_pixels=512",
]  # fmt: skip


def released_with(encoder: str) -> str:
    """A released model that has this encoder: its composition says how images are prepared, its projector how wide."""
    for plugin in plugins.usable("compositions"):
        for size in plugin.spec.sizes:
            if families.configs(plugin.name)[size]["image_encoder"]["family"] == encoder:
                return size
    raise AssertionError(f"no released model has the encoder {encoder}")


def tiny_pair(encoder: str, foundation: str) -> RunConfig:
    """The released model with its foundation replaced by this one, everything small."""
    size = plugins.load("models", foundation).sizes[0]
    words = ["--model-name", released_with(encoder), f"models/{foundation}@model.foundation={size}", *COMMON]
    whole = resolve(words)
    # Indexers of sparse attention learn from a loss of their own, and stay as they are without it.
    taught = (
        ["--dsa-indexer-loss-coeff", "1"] if hasattr(whole.model.foundation.geometry, "dsa_indexer_loss_coeff") else []
    )
    return resolve([*words, *tiny_sizes.overrides(whole), *taught])


def test_there_is_something_to_pair() -> None:
    assert {"qwen2_5_vit", "qwen3_vit"} <= set(ENCODERS)
    assert {"qwen2", "qwen3", "qwen3_moe", "llama", "deepseek3"} <= set(FOUNDATIONS)


@pytest.mark.parametrize("foundation", FOUNDATIONS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_pair_trains(encoder: str, foundation: str, megatron: Any) -> None:
    config = tiny_pair(encoder, foundation)
    assert config.model.image_encoder
    assert (config.model.image_encoder.family, config.model.foundation.family) == (encoder, foundation)
    images, losses, still = run_distributed(partial(trained, config=config), 1)[0]
    assert images > 0, "the step has images"
    assert all(abs(loss - math.log(131)) < 0.5 for loss in losses), "fresh weights know nothing of 131 tokens"
    assert still == [], "parameters that no image and no token reached"


def trained(worker: Any, config: RunConfig) -> tuple[int, list[float], list[str]]:
    """Images of the first step, losses of all steps, and the parameters that are as before."""
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.start import Start
    from loongforge.core.data.open import open_data
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import build_training

    with part_of(config) as part:
        before = {name: one.detach().clone() for name, one in parameters(part.model)}
        training = build_training(part.plan, part.world, part.model)
        with open_data(part.plan, part.world, Start()).loader(0) as loader:
            steps = [loader.step() for _ in range(part.plan.train_iters)]
        losses = [train_step(part.plan, part.world, training, step, at).loss for at, step in enumerate(steps)]
        still = [name for name, one in parameters(part.model) if torch.equal(one, before[name])]
    return sum(len(batch["grid"]) for batch in steps[0]), losses, still


def parameters(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (f"{slot}.{name}", parameter)
        for slot, modules in model.modules.items()
        for module in modules
        for name, parameter in module.named_parameters()
    ]
