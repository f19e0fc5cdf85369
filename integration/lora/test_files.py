"""Adapters on the disk: PEFT's own load here, merging equals PEFT's, unmerging gives the base back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_cases import LORA
from safetensors.torch import load_file, save_file

TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj", "gate_proj"]


@pytest.fixture(scope="module")
def theirs(shelf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of qwen3 that PEFT made and wrote, with patterns of its own."""
    path = tmp_path_factory.mktemp("peft") / "adapter"
    shelf.reference.create("qwen3", shelf.base("qwen3"), TARGETS, path)
    return path


def test_an_adapter_of_peft_loads(theirs: Path, shelf: Any, tmp_path: Path) -> None:
    from lora_run import ADAPTER, config_of, measure, train

    from loongforge.ckpt.verify.batch import make_batch
    from loongforge.ckpt.verify.difference import Side, differences

    config = config_of(LORA["qwen3"], shelf.base("qwen3"), "one", "--lora-adapter-path", str(theirs))
    batch, out = tmp_path / "batch.safetensors", tmp_path / "reference.safetensors"
    save_file(make_batch(config, 4), batch)
    loss = shelf.reference.adapted("qwen3", shelf.base("qwen3"), theirs, batch, out, by_peft=True)
    tensors = load_file(out)
    expected = Side(loss=loss, logits=tensors.pop("logits"), gradients=tensors)
    found = differences(measure(config, 1, tmp_path / "ours"), expected)
    assert found[0].worst < 2e-5, found[:3]
    train(config, 1, [], tmp_path / "round")  # load and write again
    before, after = load_file(theirs / ADAPTER), load_file(tmp_path / "round" / ADAPTER)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    said = json.loads((tmp_path / "round" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["target_modules"]) == (4, 6, sorted(TARGETS))
    assert said["rank_pattern"] == {"o_proj": 3}
    assert said["alpha_pattern"] == {r"model\.layers\.1\.self_attn\.k_proj": 9}
    assert said["base_model_name_or_path"] == str(shelf.base("qwen3"))


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_merging_equals_peft_and_can_be_undone(name: str, shelf: Any, tmp_path: Path) -> None:
    from proof import read

    from loongforge.ckpt.peft.command import command

    case = LORA[name]
    base, adapter = shelf.base(case.zoo), shelf.adapter(name)
    assert command([str(base), str(adapter), str(tmp_path / "merged"), "--json"]) == 0
    shelf.reference.merged(case.zoo, base, adapter, tmp_path / "theirs")
    ours, theirs, before = (read(path) for path in (tmp_path / "merged", tmp_path / "theirs", base))
    assert ours.keys() == theirs.keys() == before.keys()
    changed = [key for key in ours if not torch.equal(ours[key], before[key])]
    assert len(changed) == len(load_file(adapter / "adapter_model.safetensors")) // 2
    for key, tensor in theirs.items():
        # Both add one fp32 product to one fp32 matrix: apart by one rounding.
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-7)
    assert command([str(tmp_path / "merged"), str(adapter), str(tmp_path / "again"), "--unmerge"]) == 0
    for key, tensor in read(tmp_path / "again").items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=1e-7)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in base.iterdir()}


def test_merged_experts_give_the_same_model(shelf: Any, tmp_path: Path) -> None:
    """W + scale x B A as the reference computes it, from the merged files by transformers alone."""
    from loongforge.ckpt.peft.command import command

    case, expected = LORA["qwen3_moe"], shelf.expected("qwen3_moe")
    assert command([str(shelf.base(case.zoo)), str(shelf.adapter("qwen3_moe")), str(tmp_path / "merged")]) == 0
    batch = shelf.adapter("qwen3_moe").parent / "batch.safetensors"
    out = tmp_path / "out.safetensors"
    loss = shelf.reference.measure(case.zoo, tmp_path / "merged", batch, out)["loss"]
    assert loss == pytest.approx(expected.loss, rel=1e-6)
    torch.testing.assert_close(load_file(out)["logits"], expected.logits, rtol=0, atol=2e-5)


def test_peft_takes_experts_and_routers(shelf: Any, tmp_path: Path) -> None:
    """What we write of a model with experts, module by module, PEFT brings into transformers' stacked tensors."""
    from loongforge.ckpt.peft.config import CONFIG

    adapter, expected = shelf.adapter("qwen3_moe"), shelf.expected("qwen3_moe")
    assert json.loads((adapter / CONFIG).read_text())["target_modules"][:2] == ["down_proj", "gate"]
    batch, out = adapter.parent / "batch.safetensors", tmp_path / "out.safetensors"
    loss = shelf.reference.logits(LORA["qwen3_moe"].zoo, shelf.base("qwen3_moe"), adapter, batch, out)
    assert loss == pytest.approx(expected.loss, rel=1e-6)
    torch.testing.assert_close(load_file(out)["logits"], expected.logits, rtol=0, atol=2e-5)


def test_adapters_of_further_layers_are_optional(shelf: Any, tmp_path: Path) -> None:
    """transformers has no further layers: PEFT loads what the model has, and so do we without them, aloud."""
    from lora_run import config_of, notes_of

    name = "deepseek_v3 predicting attention"
    case, adapter, expected = LORA[name], shelf.adapter(name), shelf.expected(name)
    base, batch, out = shelf.base(case.zoo), adapter.parent / "batch.safetensors", tmp_path / "out.safetensors"
    loss = shelf.reference.logits(case.zoo, base, adapter, batch, out)
    assert loss == pytest.approx(expected.loss, rel=1e-6)
    torch.testing.assert_close(load_file(out)["logits"], expected.logits, rtol=0, atol=2e-5)
    alone = config_of(case, base, "one", "--lora-adapter-path", str(adapter), "--mtp-num-layers", "0")
    further = sum(".layers.4." in name for name in load_file(adapter / "adapter_model.safetensors"))
    assert further == 12
    assert notes_of(alone)[-1] == (
        f"{adapter}: {further} tensors of multi-token prediction are left out; --mtp-num-layers 1 trains them with the "
        "model."
    )


@pytest.mark.parametrize(
    ("name", "saved", "read"), [("deepseek_v3 predicting", "tp2-sp-ep2", "pp2"), ("qwen3_next", "tp2-sp", "one")]
)
def test_checkpoints_move_between_layouts(name: str, saved: str, read: str, shelf: Any, tmp_path: Path) -> None:
    """Experts, routers, latent attention, further layers, delta rules: every bit of every adapter arrives."""
    from lora_cases import RUNS
    from lora_run import ADAPTER, config_of, through_checkpoint

    case, adapter = LORA[name], shelf.adapter(name)
    begin = ("--lora-adapter-path", str(adapter), "--no-save-optim")
    first = config_of(case, shelf.base(case.zoo), saved, *begin, "--save", str(tmp_path / "run"))
    other = config_of(case, shelf.base(case.zoo), read, *begin), RUNS[read][1]
    through_checkpoint(first, other, RUNS[saved][1], tmp_path / "out")
    before, after = load_file(adapter / ADAPTER), load_file(tmp_path / "out" / ADAPTER)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
