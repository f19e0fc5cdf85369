"""What a vision tower promises beside parity: layouts, corner cases, refusals."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny_towers import (
    CONFIGS,
    GRID,
    differences,
    import_heavy,
    named,
    pixels,
    relative,
    scalar,
    tables,
    towers,
)

from loongforge.core.env import Worker
from loongforge.core.errors import ConfigError
from loongforge.core.testing import run_distributed

NAMES = ["qwen3_vit", "qwen2_5_vit"]
PARTED = ("linear_qkv", "linear_proj.weight", "linear_fc1", "linear_fc2.weight")
"""What tensor parallel ranks share; every other parameter is whole on each."""


@pytest.fixture(scope="module", autouse=True)
def heavy() -> None:
    import_heavy()


def gradients(worker: Worker, name: str, tp: int, **options: Any) -> dict[str, torch.Tensor]:
    with towers(worker, name, tp, initialise=True, **options) as (encoder, projector):
        scalar(projector(encoder(pixels(name, GRID), GRID), GRID)).backward()
        return {key: value.grad for key, value in named(encoder, projector).items() if value.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_whole_parameters_have_one_gradient_on_all_ranks(name: str) -> None:
    first, second = run_distributed(partial(gradients, name=name, tp=2), 2)
    whole = [key for key in first if not any(part in key for part in PARTED)]
    assert "patch_embed.proj.weight" in whole
    assert "merger.norm.weight" in whole
    for key in whole:
        assert torch.equal(first[key], second[key]), key


def fresh(worker: Worker, name: str, tp: int) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, ...]]]:
    """Parameters, and the shape that a checkpoint gives each as a whole."""
    with towers(worker, name, tp, initialise=True) as (encoder, projector):
        state = encoder.sharded_state_dict() | projector.sharded_state_dict()
        shapes = {
            key: tuple(getattr(value, "global_shape", ()))
            for key, value in state.items()
            if not key.endswith("_extra_state")
        }
        return {key: value.detach() for key, value in named(encoder, projector).items()}, shapes


@pytest.mark.parametrize("name", NAMES)
def test_fresh_weights_do_not_depend_on_the_layout(name: str) -> None:
    ((whole, shapes),) = run_distributed(partial(fresh, name=name, tp=1), 1)
    parts = run_distributed(partial(fresh, name=name, tp=2), 2)
    assert shapes.keys() == parts[0][1].keys() == whole.keys()
    for key, value in whole.items():
        pieces = [part[0][key] for part in parts]
        if not any(part in key for part in PARTED):
            assert torch.equal(pieces[0], value), key
            continue
        dim = 1 if value.dim() == 2 and ("linear_proj" in key or "linear_fc2" in key) else 0
        if name == "qwen2_5_vit" and "decoder" in key and "linear_fc1" in key:
            halves = [piece.chunk(2) for piece in pieces]
            joined = torch.cat([half[place] for place in (0, 1) for half in halves])
        else:
            joined = torch.cat(pieces, dim)
        assert torch.equal(joined, value), key
    matrices = torch.cat([value.flatten() for value in whole.values() if value.dim() > 1])
    assert abs(matrices.std().item() - 0.02) < 5e-4
    assert all(bool((value == 1).all()) for key, value in whole.items() if key.endswith("norm.weight"))
    assert all(bool((value == 0).all()) for key, value in whole.items() if key.endswith("bias"))
    for key, shape in shapes.items():
        assert parts[0][1][key] == shape, key


def weights_missing(worker: Worker, name: str) -> set[str]:
    """Parameters of this encoder with the other encoder's projector that no rule, or more than one, names."""
    import re

    with towers(worker, name, 1) as (encoder, projector):
        rules = [rule.megatron for table in tables(name) for rule in table.rules]
        found = set[str]()
        for key in named(encoder, projector):
            generic = re.sub(r"layers\.\d+", "layers.{layer}", re.sub(r"mergers\.\d+", "mergers.{level}", key))
            if rules.count(generic) != 1:
                found.add(key)
        return found


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_one_rule(name: str, swapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the other release's projector too: RMSNorm mergers behind deepstack levels."""
    import tiny_towers

    if swapped:
        other = {"qwen3_vit": "qwen2_5_vit", "qwen2_5_vit": "qwen3_vit"}[name]
        monkeypatch.setitem(tiny_towers.ADAPTERS, name, tiny_towers.ADAPTERS[other])
    assert run_distributed(partial(weights_missing, name=name), 1) == [set()]


def no_items(worker: Worker, name: str, tp: int) -> tuple[tuple[int, ...], set[str]]:
    """Shape of the features, and the parameters whose gradient is absent or not zero."""
    with towers(worker, name, tp, initialise=True) as (encoder, projector):
        features = projector(encoder(pixels(name, []), []), [])
        features.sum().backward()
        parameters = named(encoder, projector)
        return tuple(features.shape), {key for key, p in parameters.items() if p.grad is None or bool(p.grad.any())}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_no_items_at_all(name: str, tp: int) -> None:
    levels = CONFIGS[name].geometry().levels
    for shape, wrong in run_distributed(partial(no_items, name=name, tp=tp), tp):
        assert shape == (0, 1 + levels, 20)
        assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_one_item_of_one_square(name: str) -> None:
    (found,) = run_distributed(partial(differences, name=name, tp=1, grid=[(1, 2, 2)]), 1)
    assert max(found.values()) < 2e-5, sorted(found.items(), key=lambda pair: -pair[1])[:3]


def item_alone(worker: Worker, name: str) -> float:
    """Difference of an item's features with neighbours and without."""
    with towers(worker, name, 1, initialise=True) as (encoder, projector), torch.no_grad():
        patches = pixels(name, GRID)
        together = projector(encoder(patches, GRID), GRID)
        before = GRID[0][0] * GRID[0][1] * GRID[0][2]
        own = GRID[1][0] * GRID[1][1] * GRID[1][2]
        alone = projector(encoder(patches[before : before + own], GRID[1:2]), GRID[1:2])
        return relative(together[before // 4 : (before + own) // 4], alone)


@pytest.mark.parametrize("name", NAMES)
def test_items_do_not_see_each_other(name: str) -> None:
    # Measured 0; matrix products of other sizes may round otherwise elsewhere.
    assert run_distributed(partial(item_alone, name=name), 1)[0] < 2e-6


def frozen_patches(worker: Worker, name: str) -> list[str]:
    """Trainable parameters without a gradient when the patch embedding is frozen and layers are recomputed."""
    with towers(worker, name, 1, initialise=True, recompute_granularity="full") as (encoder, projector):
        for key, parameter in encoder.named_parameters():
            parameter.requires_grad_(key.startswith("decoder"))
        scalar(projector(encoder(pixels(name, GRID), GRID), GRID)).backward()
        trained = named(encoder, projector).items()
        return [key for key, value in trained if value.requires_grad and value.grad is None]


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_layers_train_behind_frozen_patches(name: str) -> None:
    assert run_distributed(partial(frozen_patches, name=name), 1) == [[]]


def bf16(worker: Worker, name: str) -> tuple[torch.dtype, float]:
    with towers(worker, name, 1, initialise=True) as (encoder, projector), torch.no_grad():
        right = projector(encoder(pixels(name, GRID), GRID), GRID)
    with towers(worker, name, 1, initialise=True, precision="bf16") as (encoder, projector), torch.no_grad():
        ours = projector(encoder(pixels(name, GRID), GRID), GRID)
    return ours.dtype, relative(ours.float(), right)


@pytest.mark.parametrize("name", NAMES)
def test_bf16(name: str) -> None:
    ((kind, difference),) = run_distributed(partial(bf16, name=name), 1)
    assert kind is torch.bfloat16
    assert difference < 0.05  # measured 0.008: eight bits of mantissa through four layers


def refusal(worker: Worker, name: str, **options: Any) -> str:
    try:
        with towers(worker, name, worker.world_size, **options):
            return "no refusal"
    except ConfigError as error:
        return str(error)


def test_recompute_that_would_lose_a_level() -> None:
    options = {"recompute_granularity": "full", "recompute_num_layers": 2}
    (text,) = run_distributed(partial(refusal, name="qwen3_vit", **options), 1)
    assert "model.image_encoder.recompute_num_layers=2: deepstack layers [0, 2] (from 0) lie inside" in text
    assert "recompute_method to block" in text


def test_tensor_parallel_size_that_does_not_divide() -> None:
    text = run_distributed(partial(refusal, name="qwen2_5_vit"), 3)[0]
    assert "tensor_model_parallel_size=3: does not divide num_attention_heads=4" in text


def test_projector_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny_towers

    from loongforge.models.vision.qwen_mlp_adapter.config import QwenMlpAdapterConfig

    wrong = QwenMlpAdapterConfig(input_size=47, output_size=21)
    monkeypatch.setitem(tiny_towers.ADAPTERS, "qwen3_vit", wrong)
    (text,) = run_distributed(partial(refusal, name="qwen3_vit"), 1)
    assert "model.image_projector.input_size=47: model.image_encoder.hidden_size is 48" in text
    assert "model.image_projector.output_size=21: model.foundation.hidden_size is 20" in text
