"""What `adapter_config.json` says is taken as PEFT means it, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from loongforge.ckpt.peft.config import CONFIG, read_config
from loongforge.core.config.resolve import resolve
from loongforge.core.errors import CheckpointError, ConfigError
from loongforge.core.plan import Plan


def write(path: Path, **said: Any) -> Path:
    """A directory with what PEFT writes of these options."""
    path.mkdir(exist_ok=True)
    content = LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]} | said)).to_dict()
    content["peft_type"] = "LORA"
    (path / CONFIG).write_text(json.dumps(content, default=sorted))  # sets
    return path


def test_every_number_is_the_one_that_peft_has(tmp_path: Path) -> None:
    said = {"target_modules": r".*\.[0-3]\..*(q|o)_proj", "rank_pattern": {"o_proj": 3}, "use_rslora": True}
    path = write(tmp_path / "adapter", **said, alpha_pattern={r"layers\.1\..*q_proj": 9})
    config = resolve(["--model-name", "qwen3-0.6b", "--train-iters", "1", "--lora-adapter-path", str(path)])
    found = {one.matrix.module: (one.rank, one.scale) for one in Plan.of(config, 1).adapters}
    assert len(found) == 8
    assert found["model.layers.0.self_attn.q_proj"] == (4, 6 / 4**0.5)
    assert found["model.layers.1.self_attn.q_proj"] == (4, 9 / 4**0.5)
    assert found["model.layers.2.self_attn.o_proj"] == (3, 6 / 3**0.5)


@pytest.mark.parametrize(
    "said",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0, 1]},
        {"init_lora_weights": "pissa"},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"trainable_token_indices": [1, 2]},
        {"exclude_modules": ["k_proj"]},
    ],
    ids=lambda said: next(iter(said)),
)
def test_other_options_are_refused_by_name(said: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(write(tmp_path / "adapter", **said))
    assert f"{next(iter(said))}=" in str(caught.value)


def test_a_run_that_says_otherwise_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "adapter")
    model = ["--model-name", "qwen3-0.6b", "--train-iters", "1", "--lora-adapter-path", str(path)]
    with pytest.raises(ConfigError, match=r"lora\.rank: 8 contradicts 4 of the adapters in"):
        resolve([*model, "--lora-rank", "8"])
    agreed = resolve([*model, "--lora-rank", "4", "--lora-dropout", "0.1"]).lora
    assert (agreed.rank, agreed.alpha, agreed.dropout) == (4, 6.0, 0.1)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    path = write(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"holds adapters, not a model: give the model .* --lora-adapter-path"):
        resolve(["--load", str(path), "--train-iters", "1"])


def test_damage_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "adapter")
    (path / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_config(path)
    (path / CONFIG).write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="'IA3' is not LORA"):
        read_config(path)
