"""Every shipped whole is the released model, and transformers reads what we write of it."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from loongforge.core import plugins
from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import ModelConfig

PLACES = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def qwen3_vl(text: dict[str, Any], *, small: bool = False, tied: bool = False) -> dict[str, Any]:
    moe = "num_experts" in text
    kind = "qwen3_vl_moe" if moe else "qwen3_vl"
    large = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    little = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    return {
        **PLACES,
        "architectures": ["Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"],
        "model_type": kind,
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 262144,
            "model_type": f"{kind}_text",
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "use_cache": True,
            "vocab_size": 151936,
            **({"tie_word_embeddings": True} if tied else {}),
            **text,
        },
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "model_type": kind,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **(little if small else large),
        },
    }


def dense(layers: int, hidden: int, ffn: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
    }


def experts(layers: int, hidden: int, ffn: int, heads: int, width: int) -> dict[str, Any]:
    return {
        **dense(layers, hidden, ffn, heads),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
    }


def qwen2_5_vl(
    layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int, wide: bool, tied: bool = False
) -> dict[str, Any]:
    return {
        **PLACES,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "hidden_act": "silu",
            "hidden_size": 1280,
            "in_chans": 3,
            "intermediate_size": 3456 if wide else 3420,
            "model_type": "qwen2_5_vl",
            "num_heads": 16,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
        },
        "vision_token_id": 151654,
        "vocab_size": vocab,
    }


RELEASED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qwen3_vl_2b": ("qwen3_vl", 2_127_532_032, qwen3_vl(dense(28, 2048, 6144, 16), small=True, tied=True)),
    "qwen3_vl_4b": ("qwen3_vl", 4_437_815_808, qwen3_vl(dense(36, 2560, 9728, 32), small=True, tied=True)),
    "qwen3_vl_8b": ("qwen3_vl", 8_767_123_696, qwen3_vl(dense(36, 4096, 12288, 32))),
    "qwen3_vl_32b": ("qwen3_vl", 33_357_390_064, qwen3_vl(dense(64, 5120, 25600, 64))),
    "qwen3_vl_30b_a3b": ("qwen3_vl_moe", 31_070_754_032, qwen3_vl(experts(48, 2048, 6144, 32, 768))),
    "qwen3_vl_235b_a22b": ("qwen3_vl_moe", 235_670_022_896, qwen3_vl(experts(94, 4096, 12288, 64, 1536))),
    "qwen2_5_vl_3b": ("qwen2_5_vl", 3_754_622_976, qwen2_5_vl(36, 2048, 11008, 16, 2, 151936, False, tied=True)),
    "qwen2_5_vl_7b": ("qwen2_5_vl", 8_292_166_656, qwen2_5_vl(28, 3584, 18944, 28, 4, 152064, False)),
    "qwen2_5_vl_32b": ("qwen2_5_vl", 33_452_718_336, qwen2_5_vl(64, 5120, 27648, 40, 8, 152064, True)),
    "qwen2_5_vl_72b": ("qwen2_5_vl", 73_410_777_344, qwen2_5_vl(80, 8192, 29568, 64, 8, 152064, True)),
}
"""Composition, parameters and contents of the released file by our name of the size."""


def shipped(size: str) -> ModelConfig:
    return resolve(["--model-name", size, "--train-iters", "1"], note=lambda _: None).model


def test_specs_files_and_releases_name_the_same_sizes() -> None:
    for name, package in (("qwen3_vl",) * 2, ("qwen3_vl_moe", "qwen3_vl"), ("qwen2_5_vl",) * 2):
        spec = plugins.load("compositions", name)
        folder = Path(str(files(f"loongforge.models.{package}"))) / spec.configs
        ours = sorted(path.stem for path in folder.glob("*.yaml"))
        assert sorted(spec.sizes) == ours == sorted(size for size, (owner, *_) in RELEASED.items() if owner == name)
        for path in folder.glob("*.yaml"):
            assert yaml.safe_load(path.read_text())["model_type"] == name


@pytest.mark.parametrize("size", RELEASED)
def test_yaml_is_the_released_model(size: str, typed: Any) -> None:
    name, _, hf = RELEASED[size]
    ours = shipped(size)
    theirs = typed({"model_type": name, **plugins.load("compositions", name).components()(hf)})
    assert ours.model_type == name
    assert ours.foundation == theirs.foundation
    assert ours.image_encoder == theirs.image_encoder
    # A release states the projector's two widths, our files leave them to its neighbours.
    stated = theirs.components["image_projector"].geometry
    assert (stated.input_size, stated.output_size) == (
        hf["vision_config"]["hidden_size"],
        ours.foundation.geometry.hidden_size,
    )
    assert ours.components["image_projector"].geometry.normalization == stated.normalization


@pytest.mark.parametrize("size", RELEASED)
def test_transformers_reads_what_we_write_and_counts_the_same(size: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    name, count, hf = RELEASED[size]
    spec = plugins.load("compositions", name)
    written = json.loads(json.dumps(spec.to_hf()(shipped(size))))
    assert spec.components()(written) == spec.components()(hf)
    theirs = AutoConfig.for_model(**written)
    released = AutoConfig.for_model(**hf)
    assert meaning(theirs) == meaning(released)
    assert spec.components()(theirs.to_dict()) == spec.components()(released.to_dict())
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(theirs)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    package = "qwen3_vl" if name.startswith("qwen3") else name
    readme = Path(str(files(f"loongforge.models.{package}"))) / "README.md"
    assert f"{count:,}".replace(",", " ") in readme.read_text()


def meaning(config: Any) -> dict[str, Any]:
    """Every field that says something about the model, as transformers holds it."""
    idle = {"transformers_version", "dtype", "max_window_layers", "in_chans", "spatial_patch_size", "vision_token_id"}
    found: dict[str, Any] = config.to_dict()
    for section in (found, found["text_config"], found["vision_config"]):
        for key in [key for key in section if key in idle]:
            del section[key]
    for key in ("norm_topk_prob", "tie_word_embeddings"):  # which these text sections are not asked
        found["text_config"].pop(key, None)
    rope = found["text_config"]["rope_parameters"]
    rope.pop("type", None)
    return found


def test_the_custom_model_resolves_and_has_no_architecture() -> None:
    model = shipped("qwen_vit_llama3_8b")
    spec = plugins.load("compositions", "qwen_vit_llama")
    assert [component.family for component in model.components.values()] == [
        "qwen2_5_vit",
        "qwen_mlp_adapter",
        "llama",
    ]
    assert (spec.to_hf, spec.components, spec.hf_architectures) == (None, None, ())
    assert plugins.load("compositions", "qwen2_5_vl").to_hf()(model) is None
    assert model.foundation.geometry == shipped("llama3_8b").foundation.geometry


def test_the_yaml_in_the_readme_of_the_custom_model_resolves(tmp_path: Path) -> None:
    text = (Path(str(files("loongforge.models.qwen_vit_llama"))) / "README.md").read_text()
    file = tmp_path / "run.yaml"
    file.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    for directory in ("Qwen2.5-VL-7B-Instruct", "Meta-Llama-3-8B"):
        assert directory in file.read_text()
    model = resolve(["--config-file", str(file), "--train-iters", "1"], note=lambda _: None).model
    assert [component.load for component in model.components.values()] == [
        "Qwen2.5-VL-7B-Instruct",
        "random",
        "Meta-Llama-3-8B",
    ]
    assert model.foundation.family == "llama"
