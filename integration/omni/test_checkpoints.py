"""Vision-language runs: weights both ways, components from directories of their own, exact resume on any layout."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import omni_run as run
import pytest
import torch

from loongforge.core.checkpoint.directory import RunDirectory
from loongforge.core.config.run import ComponentConfig, ModelConfig, RunConfig
from loongforge.core.errors import CheckpointError
from loongforge.core.testing import run_distributed

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
ZERO1 = ["--use-distributed-optimizer"]
EP2 = ["--expert-model-parallel-size", "2"]
RATES = ["--lr", "1e-3", "--min-lr", "1e-4", "--weight-decay", "0.1"]
TE1 = ["+model.image_encoder.tensor-model-parallel-size=1"]
AHEAD = ["--enable-full-hetero-dp"]
APART = ["--encoder-ranks", "1"]

LAYOUTS: dict[str, tuple[list[str], int]] = {
    "one": ([], 1),
    "tp2-te2": (TP2, 2),
    "tp2-te1": ([*TP2, *TE1], 2),
    "pp2-inline": (PP2, 2),
    "pp2-ahead": ([*PP2, *AHEAD], 2),
    "dp2-zero1": (ZERO1, 2),
    "tp2-te1-zero1": ([*TP2, *TE1, *ZERO1], 2),
    "tp2-te2-zero1": ([*TP2, *ZERO1], 2),
    "pp2-ahead-zero1": ([*PP2, *AHEAD, *ZERO1], 2),
    "ep2": (EP2, 2),
    "ep2-zero1": ([*EP2, *ZERO1], 2),
    "apart-pp2": ([*PP2, *APART], 3),
    "apart-tp2-zero1": ([*TP2, *APART, *ZERO1], 3),
    "apart-tp2-ep2-zero1": (
        [*TP2, *APART, *EP2, *ZERO1, "--sequence-parallel", "--expert-tensor-parallel-size", "1"],
        3,
    ),
}
MIXES = ("mixed", "everywhere", "one huge")
TOLERANCE = 1e-5
"""Relative, of weights after three steps, one of them behind the move; fp32."""


def of_layout(name: str, load: Path, *more: str) -> tuple[RunConfig, int]:
    flags, world = LAYOUTS[name]
    return run.config_of(load, [*flags, *RATES, *more]), world


def train(config: RunConfig, world: int, out: Path, save: Path | None = None) -> tuple[list[float], run.Tensors]:
    """From the beginning, or from the checkpoint at `--load`, to the end of `MIXES`; losses, and weights afterwards.

    With `save` a checkpoint is written behind the second step.
    """
    seen = run_distributed(partial(_train, config=config, out=out, save=save), world)
    return seen[0], run.read(out)


def _train(worker: Any, config: RunConfig, out: Path, save: Path | None) -> list[float]:
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.export import export_hf
    from loongforge.core.checkpoint.load import load_training, load_weights
    from loongforge.core.checkpoint.save import Saver
    from loongforge.core.checkpoint.start import find_start
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import build_training

    with part_of(config) as part:
        start = find_start(config.checkpoint)
        load_weights(part.plan, part.world, part.model, start)
        training = build_training(part.plan, part.world, part.model)
        load_training(part.plan, part.world, training, start)
        losses: list[float] = []
        for step in range(start.step, len(MIXES)):
            losses.append(train_step(part.plan, part.world, training, run.my_batches(part, MIXES[step]), step).loss)
            if save and step == 1:
                saving = replace(
                    part.plan, config=replace(config, checkpoint=replace(config.checkpoint, save=str(save)))
                )
                Saver(saving, part.world, {}).save(training, step + 1, 0)
        export_hf(part.plan, part.world, training, out)
    return losses


def moved(source: Path, before: str, after: str, scratch: Path) -> tuple[Any, Any]:
    """A run that was not interrupted, and one that goes on from its checkpoint on another layout."""
    config, world = of_layout(before, source)
    whole = train(config, world, scratch / "whole", scratch / "run")
    config, world = of_layout(after, source)
    section = replace(config.checkpoint, load=str(RunDirectory(scratch / "run").path(2)))
    return whole, train(replace(config, checkpoint=section), world, scratch / "resumed")


@pytest.mark.parametrize(
    "layout", ["one", "tp2-te1", "pp2-ahead", "tp2-te2-zero1", "ep2-zero1", "apart-pp2", "apart-tp2-zero1"]
)
def test_resume_on_the_same_layout_is_exact(layout: str, megatron: Any, vlm: dict[str, Path], tmp_path: Path) -> None:
    family = "qwen3_vl_moe" if "ep2" in layout else "qwen3_vl"
    (losses, weights), (last, again) = moved(vlm[family], layout, layout, tmp_path)
    assert last == losses[2:]
    assert weights.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


MOVES = [
    ("pp2-inline", "pp2-ahead", "qwen3_vl"),
    ("pp2-ahead", "tp2-te1", "qwen2_5_vl"),
    ("tp2-te1", "tp2-te2", "qwen2_5_vl"),
    ("tp2-te2-zero1", "tp2-te1-zero1", "qwen3_vl"),
    ("pp2-ahead-zero1", "dp2-zero1", "qwen2_5_vl"),
    ("ep2", "one", "qwen3_vl_moe"),
    ("apart-pp2", "tp2-te1", "qwen2_5_vl"),
    ("tp2-te2-zero1", "apart-tp2-zero1", "qwen3_vl"),
    ("apart-tp2-ep2-zero1", "ep2-zero1", "qwen3_vl_moe"),
]


@pytest.mark.parametrize(("before", "after", "family"), MOVES, ids=["-to-".join(move) for move in MOVES])
def test_a_run_goes_on_on_another_layout(
    before: str, after: str, family: str, megatron: Any, vlm: dict[str, Path], tmp_path: Path
) -> None:
    (losses, weights), (last, again) = moved(vlm[family], before, after, tmp_path)
    assert abs(last[0] - losses[2]) <= TOLERANCE * losses[2]
    distance, where = run.worst(again, weights)
    print(f"worst {distance:.1e} in {where}")
    assert distance <= TOLERANCE, where


ROUND_TRIPS = {
    "tp2-te1": ([*TP2, *TE1], 2),
    "pp2-ahead": ([*PP2, *AHEAD], 2),
    "tp2-ep4": ([*TP2, "--sequence-parallel", "--expert-model-parallel-size", "4"], 4),
    "etp2-ep2": (
        [*TP2, "--sequence-parallel", "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "2"], 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "family"),
    [(layout, "qwen2_5_vl") for layout in ("tp2-te1", "pp2-ahead")]
    + [(layout, "qwen3_vl_moe") for layout in ("pp2-ahead", "tp2-ep4", "etp2-ep2")],
)
def test_weights_there_and_back(layout: str, family: str, megatron: Any, vlm: dict[str, Path], tmp_path: Path) -> None:
    flags, world = ROUND_TRIPS[layout]
    more = ["--expert-tensor-parallel-size", "1"] if layout == "tp2-ep4" else []
    moved_on(run.config_of(vlm[family], [*flags, *more]), world, tmp_path / "out")
    same(run.read(tmp_path / "out"), run.read(vlm[family]))
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (vlm[family], tmp_path / "out"))
    assert ours["architectures"] == theirs["architectures"]
    assert ours["image_token_id"] == theirs["image_token_id"], "what we do not know travels along"


def same(found: run.Tensors, expected: run.Tensors) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def moved_on(config: RunConfig, world: int, out: Path) -> list[str]:
    """Load as a run would and export; what it notes."""
    return run_distributed(partial(_moved_on, config=config, out=out), world)[0]


def _moved_on(worker: Any, config: RunConfig, out: Path) -> list[str]:
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.export import export_hf
    from loongforge.core.checkpoint.load import load_weights
    from loongforge.core.checkpoint.start import find_start

    with part_of(config) as part:
        notes = load_weights(part.plan, part.world, part.model, find_start(config.checkpoint))
        export_hf(part.plan, part.world, part.model, out)
    return notes


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny_vlm
    import transformers as hf

    path = tmp_path_factory.mktemp("llama")
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**tiny_vlm.TEXT, head_dim=16, bos_token_id=1, eos_token_id=2))
    tiny_vlm.randomise(model, seed=3)
    model.save_pretrained(path)
    return path


def combined(vision: Path, llama: Path, flags: list[str], **load: str) -> RunConfig:
    """The encoder of one directory before the language model of another."""
    from loongforge.models.llama.config import LlamaConfig

    config = run.config_of(vision, flags)
    encoder, projector = config.model.image_encoder, config.model.image_projector
    assert encoder
    assert projector
    text = LlamaConfig.from_hf(json.loads((llama / "config.json").read_text()))
    model = ModelConfig(
        model_type="qwen_vit_llama",
        image_encoder=replace(encoder, load=load.get("image_encoder")),
        image_projector=replace(projector, load=load.get("image_projector")),
        foundation=ComponentConfig(family="llama", geometry=text, load=load.get("foundation")),
    )
    return replace(config, model=model, checkpoint=replace(config.checkpoint, load=load.get("whole")))


def test_components_of_different_directories(megatron: Any, vlm: dict[str, Path], llama: Path, tmp_path: Path) -> None:
    vision = vlm["qwen2_5_vl"]
    given = {"image_encoder": str(vision), "image_projector": "random", "foundation": str(llama)}
    notes = moved_on(combined(vision, llama, [*TP2, *TE1], **given), 2, tmp_path / "first")
    assert notes == [
        f"image_encoder: hf weights of {vision}.",
        "image_projector: freshly initialised.",
        f"foundation: hf weights of {llama}.",
    ]
    first = tmp_path / "first"
    assert sorted(path.name for path in first.iterdir()) == ["foundation", "image_encoder", "image_projector"]
    same(run.read(first / "foundation"), run.read(llama))
    whole = run.read(vision)
    encoder = run.read(first / "image_encoder")
    begin = next(name for name in whole if "visual." in name).partition("visual.")[0] + "visual."
    same(
        encoder,
        {
            name.removeprefix(begin): tensor
            for name, tensor in whole.items()
            if name.startswith((begin + "blocks.", begin + "patch_embed."))
        },
    )
    projector = run.read(first / "image_projector")
    assert projector.keys() == {name.removeprefix(begin) for name in whole if name.startswith(begin + "merger.")}
    assert not any(torch.equal(tensor, whole[begin + name]) for name, tensor in projector.items() if tensor.ndim > 1)

    again = combined(vision, llama, [*PP2], **{name: str(first / name) for name in given})
    moved_on(again, 2, tmp_path / "second")
    same(run.read(tmp_path / "second"), run.read(first))
    assert moved_on(combined(vision, llama, [], whole=str(first)), 1, tmp_path / "third") == []
    same(run.read(tmp_path / "third"), run.read(first))


def test_a_directory_of_text_alone_fills_the_foundation(
    megatron: Any, vlm: dict[str, Path], llama: Path, tmp_path: Path
) -> None:
    notes = moved_on(combined(vlm["qwen2_5_vl"], llama, [], whole=str(llama)), 1, tmp_path / "out")
    assert notes == ["image_encoder: freshly initialised.", "image_projector: freshly initialised."]
    same(run.read(tmp_path / "out" / "foundation"), run.read(llama))
    assert all(torch.isfinite(tensor).all() for tensor in run.read(tmp_path / "out").values())


def test_a_component_that_its_directory_lacks(vlm: dict[str, Path], llama: Path, tmp_path: Path) -> None:
    from loongforge.core.checkpoint.sources import sources
    from loongforge.core.checkpoint.start import Start

    vision = vlm["qwen2_5_vl"]
    (tmp_path / "empty").mkdir()
    given = {"image_encoder": str(tmp_path / "absent"), "image_projector": str(tmp_path / "empty")}
    with pytest.raises(CheckpointError) as caught:
        sources(combined(vision, llama, [], **given).model, Start())
    first, second = str(caught.value).splitlines()
    assert first == (
        f"model.image_encoder.load={tmp_path}/absent: no such directory. Give a Hugging Face directory, or 'random'."
    )
    assert second.startswith(f"model.image_projector.load={tmp_path}/empty: no registered format (hf) knows this")
