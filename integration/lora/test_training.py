"""Ten optimizer steps against PEFT and torch's AdamW; the model stays as it was, bit for bit, without gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_cases import LORA, RUNS
from reference import CLIP, DECAY, LEARNING_RATE
from safetensors.torch import load_file, save_file

STEPS = 10
OPTIMIZER = (
    *("--lr", str(LEARNING_RATE), "--min-lr", str(LEARNING_RATE), "--weight-decay", str(DECAY)),
    *("--clip-grad", str(CLIP), "--adam-beta2", "0.95"),
)


def look(part: Any, training: Any) -> dict[str, Any]:
    """What is in buffers and optimizer of this rank, and the model's own weights."""
    from loongforge.core.lora.table import is_adapter
    from loongforge.core.model.names import whole_model_names
    from loongforge.core.plan.memory import stage_memory
    from loongforge.core.step.optimizer import inner_optimizers

    named = whole_model_names(part.model.chunks)
    own = {name: one for name, one in named.items() if not is_adapter(name)}
    memory = stage_memory(part.plan)[part.world.pp.rank()]
    states = [
        value
        for inner in inner_optimizers(training.optimizer)
        for state in inner.state.values()
        for name, value in state.items()
        if name.startswith("exp_avg")
    ]
    buffers = [buffer for chunk in training.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return {
        "weights": {name: one.detach().clone() for name, one in own.items()},
        "with gradient": [
            name for name, one in own.items() if one.requires_grad or getattr(one, "main_grad", None) is not None
        ],
        "adapters": sum(one.numel() for name, one in named.items() if is_adapter(name)),
        "buffers": sum(buffer.grad_data.numel() for buffer in buffers),
        "moments": sum(value.numel() for value in states),
        "planned": (memory.weights // 4, memory.gradients // 4, memory.optimizer // 4),
        "held": sum(one.numel() for one in part.model.chunks[0].parameters()),
        "parts": [(one.part, one.trained, one.total) for one in part.model.parts],
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["dp2-zero1", "tp2-sp"])
def test_ten_steps_equal_peft(layout: str, shelf: Any, tmp_path: Path) -> None:
    from lora_run import ADAPTER, config_of, train

    from loongforge.ckpt.verify.batch import make_batch

    case, (_, world) = LORA["qwen3"], RUNS[layout]
    base, adapter = shelf.base(case.zoo), shelf.adapter("qwen3")
    config = config_of(case, base, layout, "--lora-adapter-path", str(adapter), *OPTIMIZER, steps=STEPS)
    batches = [make_batch(replace(config, train=replace(config.train, seed=seed)), 4) for seed in range(STEPS)]
    paths = [tmp_path / f"{number}.safetensors" for number in range(STEPS)]
    for path, batch in zip(paths, batches, strict=True):
        save_file(batch, path)
    expected = shelf.reference.trained(case.zoo, base, adapter, paths, tmp_path / "reference.safetensors")
    results = train(config, world, batches, tmp_path / "ours", look)
    for ours, theirs, bound in zip(zip(*results[0][0], strict=True), expected.values(), (1e-4, 1e-3), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=bound, atol=0)
    found, after = load_file(tmp_path / "ours" / ADAPTER), load_file(tmp_path / "reference.safetensors")
    assert found.keys() == after.keys()
    before = load_file(adapter / ADAPTER)
    for name, tensor in after.items():
        # An entry goes at most about 10 steps x 1e-3 = 1e-2; Adam divides by a gradient's own size, so that rounding
        # grows where that is near epsilon.
        apart = (found[name] - tensor).abs()
        assert apart.mean() < 1e-5, (name, apart.mean())
        assert (tensor - before[name]).abs().mean() > 1e-3, f"{name} learns"
    for _, said in results:
        check_rank(said, world if layout == "dp2-zero1" else 1)
    check_export(shelf, case, base, tmp_path, layout)


def check_rank(said: dict[str, Any], copies: int) -> None:
    """Only adapters are in the buffers and in the optimizer, as the plan says, and the model did not move."""
    assert said["with gradient"] == []
    # The distributed optimizer pads a parameter to 64 entries.
    assert 0 < said["adapters"] <= said["buffers"] < 1.05 * said["adapters"] < 0.2 * said["held"]
    assert said["moments"] == pytest.approx(2 * said["adapters"] / copies, rel=0.05)
    assert said["planned"][0] == said["held"]
    assert said["planned"][1] == said["adapters"]
    assert said["planned"][2] == pytest.approx(2 * said["adapters"] / copies, abs=1)
    parts = {part: (trained, total) for part, trained, total in said["parts"]}
    assert all(trained == 0 for part, (trained, _) in parts.items() if part != "lora")
    assert parts["lora"][0] == parts["lora"][1] > 0


def check_export(shelf: Any, case: Any, base: Path, scratch: Path, layout: str) -> None:
    """PEFT loads what we wrote and gives the logits of our run, which loads it too; the base is as it was."""
    from lora_run import config_of, measure

    from loongforge.ckpt.verify.batch import make_batch
    from loongforge.ckpt.verify.difference import Side, differences

    config = config_of(case, base, layout, "--lora-adapter-path", str(scratch / "ours"))
    batch, out = scratch / "batch.safetensors", scratch / "again.safetensors"
    save_file(make_batch(config, 4), batch)
    loss = shelf.reference.adapted(case.zoo, base, scratch / "ours", batch, out, by_peft=True)
    tensors = load_file(out)
    expected = Side(loss=loss, logits=tensors.pop("logits"), gradients={})
    ours = measure(config, RUNS[layout][1], scratch / "again")
    found = differences(replace(ours, gradients={}), expected)
    assert found[0].worst < 2e-5, found[:3]


def test_the_model_does_not_move(shelf: Any, tmp_path: Path) -> None:
    from lora_run import config_of, train

    from loongforge.ckpt.verify.batch import make_batch

    case = LORA["qwen3_moe"]
    flags = ("--lora-rank", "2", "--lora-target-modules", "all-linear", "mlp.gate", "--lora-dropout", "0.3")
    config = config_of(case, shelf.base(case.zoo), "dp2-ep2-zero1", *flags, *OPTIMIZER)
    batches = [make_batch(replace(config, train=replace(config.train, seed=seed)), 4) for seed in range(3)]
    still = train(config, 2, [], tmp_path / "before", look)
    moved = train(config, 2, batches, tmp_path / "after", look)
    for (_, before), (_, after) in zip(still, moved, strict=True):
        assert after["with gradient"] == []
        assert before["weights"].keys() == after["weights"].keys()
        for name, tensor in before["weights"].items():
            assert torch.equal(tensor, after["weights"][name]), name
    fresh, trained = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    for name, tensor in fresh.items():
        assert tensor.any() == ("lora_A" in name), f"{name}: A begins uniform, B zero"
        if ".experts." not in name:  # few tokens: an expert may have seen none
            assert not torch.equal(tensor, trained[name]), name


def test_dropout_agrees_where_ranks_hold_the_same_inputs(shelf: Any, tmp_path: Path) -> None:
    """Two tensor parallel ranks with whole sequences: what both hold of an adapter stays equal, bit for bit."""
    from lora_run import config_of, train

    from loongforge.ckpt.verify.batch import make_batch

    config = config_of(
        LORA["qwen3"], shelf.base("qwen3"), "tp2", "--lora-rank", "4", "--lora-dropout", "0.5", *OPTIMIZER
    )
    batches = [make_batch(replace(config, train=replace(config.train, seed=seed)), 4) for seed in range(3)]
    (_, left), (_, right) = train(config, 2, batches, tmp_path / "dropout", both)
    assert any(name.endswith("q_proj_A") for name in left)
    assert any(name.endswith("o_proj_B") for name in left)
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    without = replace(config, lora=replace(config.lora, dropout=0.0))
    (_, other), _ = train(without, 2, batches, tmp_path / "without", both)
    assert not all(torch.equal(tensor, other[name]) for name, tensor in left.items()), "it drops something"


def both(part: Any, training: Any) -> dict[str, torch.Tensor]:
    """Adapters' parameters that tensor parallelism does not split."""
    from loongforge.core.lora.table import is_adapter
    from loongforge.core.model.names import whole_model_names

    return {
        name: one.detach().clone()
        for name, one in whole_model_names(part.model.chunks).items()
        if is_adapter(name) and not getattr(one, "tensor_model_parallel", False)
    }
