"""The YAML and the overrides of LoongForge's announcement run as they were printed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import omni_run
import pytest
import tiny_sizes
import torch

from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import RunConfig
from loongforge.core.testing import run_distributed

QWEN = """\
defaults:
- ../../models/image_encoder@model.image_encoder: qwen3_vit
- ../../models/image_projector@model.image_projector: qwen_mlp_adapter
- ../../models/qwen3@model.foundation: qwen3_30b_a3b
- _self_
model:
  model_type: qwen3_vl
...
"""
DEEPSEEK = QWEN.replace(
    "- ../../models/qwen3@model.foundation: qwen3_30b_a3b\n", "- ../../models/deepseek3@model.foundation: deepseek_v3\n"
)
"""Only the line of the foundation differs."""

TRAINING = ["--training-phase", "sft", "--seq-length", "32768", "--micro-batch-size", "1", "--train-iters", "10"]
LAYOUT = [
    "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "8",
]  # fmt: skip
WIDTHS = ["+model.image_encoder.tensor-model-parallel-size=1", "+model.foundation.tensor-model-parallel-size=4"]
FREEZE = ["+model.image_encoder.freeze=True", "+model.foundation.freeze=True"]
ROUTED = ["--sequence-parallel"]
"""megatron-core routes tokens to experts over tensor parallel ranks only when each has its own part of the sequence."""
WHOLE_STAGE = ["--pipeline-model-parallel-size", "1", "--expert-model-parallel-size", "64"]
"""For DeepSeek-V3, whose 61 layers two stages cannot share evenly."""

YAML = {"qwen3_30b_a3b": QWEN, "deepseek_v3": DEEPSEEK}
FULL_SIZE = {
    "qwen3_30b_a3b": ([*TRAINING, *LAYOUT, *ROUTED, *WIDTHS, *FREEZE], 64),
    "deepseek_v3": (
        [*TRAINING, *LAYOUT, *WHOLE_STAGE, "--expert-tensor-parallel-size", "4", *ROUTED, *WIDTHS, *FREEZE], 1024,
    ),
}  # fmt: skip
PARAMETERS = {"qwen3_30b_a3b": 30_532_122_624, "deepseek_v3": 671_026_404_352}
"""Of the released language models, multi-token prediction left out."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the announcement's relative paths begin."""
    path = tmp_path / "configs" / "run" / "vlm"
    path.mkdir(parents=True)
    return path


def written(name: str, folder: Path) -> Path:
    """The YAML file of a run."""
    file = folder / f"{name}.yaml"
    file.write_text(YAML[name])
    return file


@pytest.mark.parametrize("name", YAML)
def test_overrides_are_understood_as_written(name: str, folder: Path) -> None:
    flags, _ = FULL_SIZE[name]
    config = resolve(["--config-file", str(written(name, folder)), *flags])
    encoder, projector = config.model.image_encoder, config.model.image_projector
    assert encoder
    assert projector
    families = {slot: component.family for slot, component in config.model.components.items()}
    foundation = {"qwen3_30b_a3b": "qwen3_moe", "deepseek_v3": "deepseek3"}[name]
    assert families == {
        "image_encoder": "qwen3_vit", "image_projector": "qwen_mlp_adapter", "foundation": foundation,
    }  # fmt: skip
    assert encoder.parallel.tensor_model_parallel_size == 1
    assert config.parallel.tensor_model_parallel_size == 4
    assert (encoder.freeze, projector.freeze, config.model.foundation.freeze) == (True, False, True)


@pytest.mark.parametrize("name", YAML)
def test_full_size_is_planned(name: str, folder: Path) -> None:
    flags, world = FULL_SIZE[name]
    file = written(name, folder)
    ended = command_line.loongforge(
        "plan", "--json", "--config-file", file.name, "--world", world, *flags, folder=folder
    )
    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)
    components = {one["name"]: one for one in plan["components"]}
    assert components["foundation"]["parameters"] == PARAMETERS[name]
    assert components["foundation"]["axes"]["tp"] == 4
    assert components["image_encoder"]["axes"]["tp"] == 1
    assert {name: one["trains"] for name, one in components.items()} == {
        "image_encoder": False, "image_projector": True, "foundation": False,
    }  # fmt: skip


def tiny(name: str, folder: Path, flags: list[str]) -> list[str]:
    """A run of two workers and two steps, everything small and the announcement's overrides among the rest."""
    words = [
        "--config-file", str(written(name, folder)), "--fp32", "--training-phase", "sft", "--seq-length", "64",
        "--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", "2", "--lr", "1e-3",
        "--weight-decay", "0", "--num-workers", "0", "--nproc-per-node", "2", "data.source=mock",
        "data.min_pixels=64", "data.max_pixels=512", *ROUTED, WIDTHS[0], WIDTHS[1].replace("=4", "=2"), *flags,
    ]  # fmt: skip
    return [*words, *tiny_sizes.overrides(resolve(words, note=lambda _: None))]


@pytest.mark.parametrize(
    ("name", "flags", "trains"),
    [
        ("qwen3_30b_a3b", FREEZE, {"image_projector"}),
        ("deepseek_v3", FREEZE[:1], {"image_projector", "foundation"}),
    ],
    ids=["qwen3 both frozen", "deepseek encoder frozen"],
)
def test_both_train(name: str, flags: list[str], trains: set[str], folder: Path, tmp_path: Path, megatron: Any) -> None:
    words = tiny(name, folder, flags)
    run_distributed(partial(fresh, config=resolve(words, note=lambda _: None), out=tmp_path / "before"), 2)
    ended = command_line.trained(*words, "--save", tmp_path / "run", "--save-hf", "true", folder=folder)
    losses = command_line.losses(tmp_path / "run")
    assert len(losses) == 2
    assert all(3.5 < loss < 6.5 for loss in losses), "fresh weights know nothing of 131 tokens"
    table = [line for line in ended.out.splitlines() if line.strip().startswith(("image_", "foundation "))]
    for slot in ("image_encoder", "image_projector", "foundation"):
        # A row says how many parameters of how many train.
        rows = [line.split()[-2:] for line in table if line.split()[0] == slot]
        assert rows, ended.out
        assert all(trained == (total if slot in trains else "0") for trained, total in rows), ended.out
        before, after = (omni_run.read(path / slot) for path in (tmp_path / "before", tmp_path / "run" / "hf"))
        assert before.keys() == after.keys()
        changed = {one for one, tensor in after.items() if not torch.equal(tensor, before[one])}
        # The bias that balances DeepSeek's experts is no parameter: it follows the counts of tokens, not a gradient.
        learnt = {one for one in after if not one.endswith("e_score_correction_bias")}
        assert changed == (changed | learnt if slot in trains else set())


def fresh(worker: Any, config: RunConfig, out: Path) -> None:
    """Export the weights that a run begins with."""
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.export import export_hf

    with part_of(config) as part:
        export_hf(part.plan, part.world, part.model, out)
