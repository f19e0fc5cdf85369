"""The loss that teaches an indexer which keys to choose, against its equations on transformers' model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from case import LAYOUTS
from cases import EVERY
from safetensors.torch import load_file, save_file

from loongforge.core.testing import fp32_tolerance, run_distributed

NAME, COEFFICIENT = "deepseek_v32", 0.7
TOLERANCE = fp32_tolerance(2e-5)
"""Relative, fp32. Measured: below 3e-6. A loss left out leaves gradients of 0, one weighed wrong is off by 0.1."""

MASKED, GATHER = ("--dsa-route", "masked"), ("--dsa-route", "gather")
PAIRS = ("--micro-batch-size", "2")
WHOLE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
PARTS = ("--recompute-granularity", "selective", "--recompute-modules", "core_attn", "mla_up_proj")
UNEVEN = ("--decoder-first-pipeline-num-layers", "3")
"""So that no stage begins with a layer that shares; two micro-batches are in flight on the first one."""
TAUGHT = [
    (NAME, "tp2-sp", (*MASKED, *PAIRS)),
    (NAME, "cp2", (*GATHER, *PAIRS, *PARTS)),
    (NAME, "tp2-sp-ep2", (*GATHER, *WHOLE)),
    ("glm_moe_dsa", "pp2", (*UNEVEN, *MASKED, *WHOLE)),
    ("glm_moe_dsa", "pp2", (*UNEVEN, *GATHER, *PARTS)),
]
WARMED = [(NAME, "tp2-sp", (*PAIRS, *WHOLE)), ("glm_moe_dsa", "cp2", ())]


@dataclass(frozen=True)
class Reference:
    """One batch, and what transformers' model makes of it."""

    batch: dict[str, torch.Tensor]
    losses: dict[str, float]
    gradients: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def taught(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`taught(name, every=False)`: the reference of a case, made once."""
    from proof import SEQUENCES, config_of

    from loongforge.ckpt.verify.batch import make_batch

    made: dict[tuple[str, bool], Reference] = {}

    def of(name: str, *, every: bool = False) -> Reference:
        fp8 = "--dsa-indexer-fp8" in EVERY[name].flags
        if (name, every) not in made:
            scratch, directory = tmp_path_factory.mktemp("taught"), zoo.checkpoint(name)
            batch = make_batch(config_of(EVERY[name], directory, "one"), SEQUENCES)
            batch["loss_mask"][1, 3:20] = 0  # tokens that teach the indexer all the same
            save_file(batch, scratch / "batch.safetensors")
            out = scratch / "reference.safetensors"
            losses = zoo.reference.taught(
                name, directory, scratch / "batch.safetensors", out, COEFFICIENT, every=every, fp8=fp8
            )
            made[name, every] = Reference(batch, losses, load_file(out))
        return made[name, every]

    return of


def step(zoo: Any, name: str, layout: str, batch: Any, flags: tuple[str, ...], scratch: Path) -> tuple[Any, Any]:
    """What one step of ours measured, and its gradients."""
    from proof import GRADIENTS, config_of, one_step, read

    still = ("--clip-grad", "0", "--lr", "0", "--min-lr", "0", "--dsa-indexer-loss-coeff", str(COEFFICIENT))
    config = config_of(EVERY[name], zoo.checkpoint(name), layout, *still, *flags)
    scratch.mkdir(exist_ok=True)
    found = run_distributed(partial(one_step, config=config, batch=batch, scratch=scratch), LAYOUTS[layout][1])[0]
    return found, read(scratch / GRADIENTS)


def indexed(name: str) -> list[int]:
    """The model's own layers with an indexer."""
    config = EVERY[name].config
    kinds = config.get("indexer_types", ["full"] * config["num_hidden_layers"])
    return [layer for layer, kind in enumerate(kinds) if kind == "full"]


def agree(name: str, found: Any, gradients: Any, expected: Reference) -> None:
    """Loss, every gradient, and what is logged of the model's own layers."""
    from loongforge.ckpt.verify.difference import Side, differences

    nothing = torch.zeros(1)
    apart = differences(
        Side(loss=found.loss, logits=nothing, gradients=gradients),
        Side(loss=expected.losses["loss"], logits=nothing, gradients=expected.gradients),
    )
    assert apart[0].worst < TOLERANCE, apart[:5]
    layers = [found.detail[f"indexer_loss/layer_{layer}"] for layer in indexed(name)]
    assert sum(layers) == pytest.approx(expected.losses["indexers"], rel=fp32_tolerance(1e-5))


@pytest.mark.parametrize(("name", "layout", "flags"), TAUGHT)
def test_the_indexer_learns_what_attention_looks_at(
    name: str, layout: str, flags: tuple[str, ...], taught: Any, zoo: Any, tmp_path: Path
) -> None:
    """By either route, with sequences side by side, recomputed: loss, gradients and the number in the log. And a layer
    without one sees, recomputed too, what the layer before it chose in the same micro-batch."""
    expected = taught(name)
    indexers = [one for key, one in expected.gradients.items() if ".indexer." in key]
    assert len(indexers) == 5 * len(indexed(name))
    assert all(one.abs().max() > 0 for one in indexers)
    found, gradients = step(zoo, name, layout, expected.batch, flags, tmp_path)
    agree(name, found, gradients, expected)
    assert found.extra["indexer_loss"] * len(indexed(name)) == pytest.approx(
        expected.losses["indexers"], rel=fp32_tolerance(1e-5)
    )


@pytest.mark.parametrize(("layout", "flags"), [("tp2-sp", MASKED), ("cp2", GATHER)])
def test_keys_chosen_in_fp8(layout: str, flags: tuple[str, ...], taught: Any, zoo: Any, tmp_path: Path) -> None:
    """Rounded as the release rounds, on transformers' model: other keys, and everything else as ever."""
    name = "deepseek_v32 fp8"
    expected = taught(name)
    assert expected.losses["moved"] > 20
    found, gradients = step(zoo, name, layout, expected.batch, flags, tmp_path)
    agree(name, found, gradients, expected)


@pytest.mark.parametrize(("name", "layout", "flags"), WARMED)
def test_the_warm_up_teaches_the_indexer_alone_on_every_key(
    name: str, layout: str, flags: tuple[str, ...], taught: Any, zoo: Any, tmp_path: Path
) -> None:
    expected = taught(name, every=True)
    for key, gradient in expected.gradients.items():
        if ".indexer." not in key and not key.endswith("e_score_correction_bias"):  # a buffer, as it is on both sides
            gradient.zero_()  # transformers' model trains whole
    found, gradients = step(zoo, name, layout, expected.batch, (*flags, "--dsa-indexer-warmup"), tmp_path)
    agree(name, found, gradients, expected)


def test_a_further_layer_has_an_indexer_too(taught: Any, zoo: Any, tmp_path: Path) -> None:
    """Multi-token prediction: the model's own as the reference has it, the further layer's alike in two layouts."""
    name = "deepseek_v32 predicting"
    expected = taught(name)
    (one, alone), (other, spread) = (
        step(zoo, name, layout, expected.batch, flags, tmp_path / layout)
        for layout, flags in (("one", MASKED), ("tp2-sp-ep2", (*GATHER, *WHOLE, *PAIRS)))
    )
    further = [key for key in alone if key.startswith("model.layers.4.") and ".indexer." in key]
    assert len(further) == 5
    for key in further:
        assert alone[key].abs().max() > 0
        assert (alone[key] - spread[key]).abs().max() < TOLERANCE * alone[key].abs().max()
        expected.gradients[key] = alone[key]
    agree(name, one, alone, expected)
    for key in further:
        expected.gradients[key] = spread[key]
    agree(name, other, spread, expected)
    assert one.extra["mtp_loss"] == pytest.approx(other.extra["mtp_loss"], rel=fp32_tolerance(1e-5))
    assert one.detail["indexer_loss/layer_4"] == pytest.approx(
        other.detail["indexer_loss/layer_4"], rel=fp32_tolerance(1e-5)
    )
