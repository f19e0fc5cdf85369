"""Adapters of models that see against PEFT on transformers' classes: logits, loss and the gradient of every A and B."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omni_run import Measured, built, config_of, gradients, logits, read, steps, transformers_alone, worst

from loongforge.core.testing import run_distributed

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
"""PEFT asks transformers for it."""

LAYOUTS = {
    "one": ([], 1),
    "tp2": (["--tensor-model-parallel-size", "2", "--sequence-parallel"], 2),
    "pp2": (["--pipeline-model-parallel-size", "2"], 2),
    "tp2, encoder apart": (
        ["--tensor-model-parallel-size", "2", "+model.image_encoder.tensor-model-parallel-size=1"], 2,
    ),
}  # fmt: skip
WHERE = {
    # Every matrix: of the encoder, of the projector and of the language model.
    "qwen2_5_vl": ["qkv", "attn.proj", "gate_proj", "down_proj", "merger.mlp.0", "merger.mlp.2", "q_proj", "v_proj"],
    "qwen3_vl": ["qkv", "attn.proj", "linear_fc1", "linear_fc2", "q_proj", "o_proj", "up_proj"],
}
PAIRS = [("qwen2_5_vl", "one"), ("qwen2_5_vl", "tp2"), ("qwen3_vl", "tp2, encoder apart"), ("qwen3_vl", "pp2")]
TOLERANCE = 2e-5
"""Relative to a tensor's largest entry, fp32."""


@pytest.fixture(scope="module")
def theirs(vlm: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Measured]]:
    """An adapter that PEFT made and wrote, random and with other ranks in one layer, and what it computes."""
    made: dict[str, tuple[Path, Measured]] = {}
    for family, targets in WHERE.items():
        out = tmp_path_factory.mktemp("peft") / family
        create(vlm[family], targets, out)
        made[family] = out, transformers_alone(vlm[family], "mixed", adapter=out)
    return made


def create(directory: Path, targets: list[str], out: Path) -> None:
    import peft
    import transformers as hf

    torch.manual_seed(3)
    base = hf.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    ranks = {r"language_model\.layers\.1\..*": 3, r"visual\.blocks\.1\..*": 2}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, rank_pattern=ranks)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.2 if "lora_A" in name else 0.05)
    model.save_pretrained(out)


@pytest.mark.parametrize(("family", "layout"), PAIRS)
def test_gradients(family: str, layout: str, megatron: Any, vlm: dict[str, Path], theirs: Any, tmp_path: Path) -> None:
    adapter, expected = theirs[family]
    flags, world = LAYOUTS[layout]
    mine = gradients(config_of(vlm[family], [*flags, "--lora-adapter-path", str(adapter)]), world, "mixed", tmp_path)
    assert mine.loss == pytest.approx(expected.loss, rel=1e-6)
    assert any(".visual.blocks." in name for name in mine.tensors)
    assert any(".language_model.layers." in name for name in mine.tensors)
    difference, name = worst(mine.tensors, expected.tensors)
    assert difference < TOLERANCE, name


@pytest.mark.parametrize("family", WHERE)
def test_files_both_ways(family: str, megatron: Any, vlm: dict[str, Path], theirs: Any, tmp_path: Path) -> None:
    """What PEFT wrote is written again bit for bit, through a checkpoint of ours and another layout, and PEFT reads it;
    merged, transformers alone gives the logits."""
    from loongforge.ckpt.peft.command import command

    adapter, expected = theirs[family]
    config = config_of(vlm[family], ["--lora-adapter-path", str(adapter)])
    for ours, theirs_ in zip(logits(config, "mixed"), expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs_, rtol=0, atol=TOLERANCE * float(theirs_.abs().max()))
    flags = [*LAYOUTS["tp2"][0], "--lora-adapter-path", str(adapter), "--save", str(tmp_path / "run")]
    run_distributed(partial(save, config=config_of(vlm[family], flags)), 2)
    run_distributed(partial(write_again, config=config, run=tmp_path / "run", out=tmp_path / "again"), 1)
    before, after = read(adapter), read(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert command([str(vlm[family]), str(adapter), str(tmp_path / "merged"), "--json"]) == 0
    for other in (
        transformers_alone(vlm[family], "mixed", adapter=tmp_path / "again"),
        transformers_alone(tmp_path / "merged", "mixed"),
    ):
        for seen, theirs_ in zip(other.logits, expected.logits, strict=True):
            torch.testing.assert_close(seen, theirs_, rtol=0, atol=TOLERANCE * float(theirs_.abs().max()))
    said = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(vlm[family])


def save(worker: Any, config: Any) -> None:
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.save import Saver

    with part_of(config) as part:
        Saver(part.plan, part.world, fingerprint={}).save(built(part), 1, 0)


def write_again(worker: Any, config: Any, run: Path, out: Path) -> None:
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.directory import RunDirectory
    from loongforge.core.checkpoint.export import export_hf
    from loongforge.core.checkpoint.load import load_model

    with part_of(config) as part:
        checkpoint = RunDirectory(run).latest()
        assert checkpoint is not None
        load_model(part.world, part.model, checkpoint)
        export_hf(part.plan, part.world, part.model, out)


def test_steps_in_another_layout(megatron: Any, vlm: dict[str, Path], one_process: Any, tmp_path: Path) -> None:
    """Fresh adapters are the same in every layout and learn the same; the distributed optimizer spreads them."""
    lora = ["--lora-rank", "4", "--lora-alpha", "6", "--lr", "1e-2", "--min-lr", "1e-2"]
    expected, weights = one_process.steps(lora, ["mixed", "everywhere"])
    config = config_of(vlm["qwen3_vl"], [*lora, "--use-distributed-optimizer"])
    seen, found = steps(config, 2, ["mixed", "everywhere"], tmp_path)
    for ours, other in zip(seen, expected, strict=True):
        assert ours.loss == pytest.approx(other.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    assert found.keys() == weights.keys()
    assert any(".visual.merger." in name for name in found)
    for name, tensor in weights.items():
        assert tensor.any(), f"{name} learns"
        # Two steps of at most 1e-2 an entry.
        assert (found[name] - tensor).abs().mean() < 1e-5, name


def test_a_frozen_encoder_has_none(vlm: dict[str, Path]) -> None:
    from loongforge.core.plan import Plan

    frozen = ["+model.image_encoder.freeze=True", "--lora-rank", "4"]
    plan = Plan.of(config_of(vlm["qwen3_vl"], frozen), 1)
    assert {one.matrix.component for one in plan.adapters} == {"image_projector", "foundation"}
    chosen = Plan.of(config_of(vlm["qwen3_vl"], ["--lora-rank", "4", "--lora-target-modules", "language_model.*"]), 1)
    assert {one.matrix.component for one in chosen.adapters} == {"foundation"}
