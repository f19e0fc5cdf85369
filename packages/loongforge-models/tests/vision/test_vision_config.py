"""Geometry of the vision encoders and the projector: released values, both directions, refusals."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_towers import theirs

from loongforge.core.errors import ConfigError
from loongforge.models.vision.qwen2_5_vit.config import Qwen2_5VitConfig
from loongforge.models.vision.qwen3_vit.config import Qwen3VitConfig
from loongforge.models.vision.qwen_mlp_adapter.config import QwenMlpAdapterConfig

QWEN3: dict[str, Any] = {
    "deepstack_visual_indexes": [8, 16, 24],
    "depth": 27,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4304,
    "model_type": "qwen3_vl",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 4096,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
QWEN2_5: dict[str, Any] = {
    "depth": 32,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
    "hidden_size": 1280,
    "in_chans": 3,
    "intermediate_size": 3420,
    "model_type": "qwen2_5_vl",
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 112,
}
RELEASED: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3_vit": (Qwen3VitConfig, QWEN3),
    "qwen3_vit_small": (Qwen3VitConfig, {**QWEN3, **SMALL, "out_hidden_size": 2560}),
    "qwen2_5_vit": (Qwen2_5VitConfig, QWEN2_5),
    "qwen2_5_vit_wide": (Qwen2_5VitConfig, {**QWEN2_5, "intermediate_size": 3456, "out_hidden_size": 8192}),
}
FAMILIES = ("qwen3_vit", "qwen2_5_vit", "qwen_mlp_adapter")


def folder(family: str) -> Path:
    return Path(str(files(f"loongforge.models.vision.{family}")))


def from_yaml(size: str) -> Any:
    kind = {"qwen3_": Qwen3VitConfig, "qwen2_": Qwen2_5VitConfig}[size[:6]]
    family = size.removesuffix("_small").removesuffix("_wide")
    values = yaml.safe_load((folder(family) / "configs" / f"{size}.yaml").read_text())
    assert values.pop("family") == family
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_spec_and_yaml_name_the_same_sizes(family: str) -> None:
    spec = import_module(f"loongforge.models.vision.{family}.spec").FAMILY
    assert spec.name == family
    assert sorted(spec.sizes) == sorted(path.stem for path in (folder(family) / "configs").glob("*.yaml"))
    assert family in spec.sizes
    assert spec.groups == (spec.role,)
    known = {field.name for field in fields(spec.config())}
    for size in spec.sizes:
        values = yaml.safe_load((folder(family) / "configs" / f"{size}.yaml").read_text())
        assert values.keys() - {"family"} == known, f"{size} leaves a field to its default"


@pytest.mark.parametrize("size", RELEASED)
def test_yaml_is_the_released_encoder(size: str) -> None:
    kind, released = RELEASED[size]
    assert from_yaml(size) == kind.from_hf(released)


@pytest.mark.parametrize("size", RELEASED)
def test_to_hf_is_the_released_section(size: str) -> None:
    kind, released = RELEASED[size]
    written = {**kind.from_hf(released).to_hf(), **QwenMlpAdapterConfig.from_hf(released).to_hf()}
    # The section's own name differs between releases, and Qwen2.5-VL leaves what has a default unsaid.
    unsaid = {"model_type"} if "in_channels" in released else {"model_type", "in_channels", "initializer_range"}
    assert {key: value for key, value in written.items() if key not in unsaid} == {
        key: value for key, value in released.items() if key not in unsaid
    }
    assert kind.from_hf(written).to_hf() | {"out_hidden_size": 0} == {**written, "out_hidden_size": 0}


@pytest.mark.parametrize("size", RELEASED)
def test_parameter_count_is_in_the_readme_and_equals_transformers(size: str) -> None:
    import torch

    config = from_yaml(size)
    with torch.device("meta"):
        model = transformers_class(config)
    whole = sum(parameter.numel() for parameter in model.parameters())
    mergers = sum(parameter.numel() for name, parameter in model.named_parameters() if "merger" in name)
    text = (folder(size.removesuffix("_small").removesuffix("_wide")) / "README.md").read_text()
    assert f"{whole - mergers:,}".replace(",", " ") in text


def transformers_class(config: Any) -> Any:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    if isinstance(config, Qwen3VitConfig):
        return Qwen3VLVisionModel(Qwen3VLVisionConfig(**config.to_hf()))
    return Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**config.to_hf()))


@pytest.mark.parametrize("name", ["qwen3_vit", "qwen2_5_vit"])
def test_reads_what_transformers_writes(name: str) -> None:
    from tiny_towers import CONFIGS, OUTPUT

    hf = theirs(name).config
    for written in (hf.to_dict(), hf.to_diff_dict()):
        assert type(CONFIGS[name]).from_hf(written) == CONFIGS[name]
        adapter = QwenMlpAdapterConfig.from_hf(written)
        assert (adapter.input_size, adapter.output_size) == (48, OUTPUT)
        assert adapter.normalization == ("LayerNorm" if name == "qwen3_vit" else "RMSNorm")


def test_geometry_of_the_released_encoders() -> None:
    geometry = from_yaml("qwen3_vit").geometry()
    assert (geometry.patch_dim, geometry.levels, geometry.features((2, 4, 6))) == (1536, 3, 12)
    geometry = from_yaml("qwen2_5_vit").geometry()
    assert (geometry.patch_dim, geometry.window_patches, geometry.levels) == (1176, 64, 0)


@pytest.mark.parametrize(
    ("size", "change", "text"),
    [
        ("qwen3_vit", {"hidden_sise": 4}, r"unknown key 'hidden_sise'.*Did you mean 'hidden_size'\?"),
        ("qwen3_vit", {"hidden_act": "silu"}, "hidden_act='silu' is not supported, only 'gelu_pytorch_tanh'"),
        ("qwen3_vit", {"model_type": "siglip"}, "vision_config.model_type 'siglip' is none of qwen3_vl_vision"),
        ("qwen3_vit", {"depth": None}, "'depth' is missing"),
        ("qwen3_vit", {"rope_parameters": {"rope_theta": 5.0, "rope_type": "axial"}}, "rope_parameters=.*5.0"),
        ("qwen3_vit", {"num_position_embeddings": 2300}, "position_embeddings=2300 must be a square number"),
        ("qwen3_vit", {"deepstack_visual_indexes": [8, 27]}, r"deepstack_layers must be .* 0 to 26, got \[8, 27\]"),
        ("qwen3_vit", {"deepstack_visual_indexes": [16, 8]}, r"deepstack_layers must be ascending.*got \[16, 8\]"),
        ("qwen3_vit", {"num_heads": 7}, "hidden_size=1152 must be a multiple of num_attention_heads=7"),
        ("qwen3_vit", {"num_heads": 64}, "hidden_size / num_attention_heads is 18, not a multiple of 4"),
        ("qwen3_vit", {"patch_size": [16, 16]}, r"patch_size must be a whole number of at least 1, got \(16, 16\)"),
        ("qwen2_5_vit", {"in_chans": 4}, "in_chans=4 is not supported, only 3"),
        ("qwen2_5_vit", {"window_size": 100}, "window_size=100 must be a multiple of .* = 28"),
        ("qwen2_5_vit", {"fullatt_block_indexes": [32]}, "full_attention_layers must be .* 0 to 31"),
        ("qwen2_5_vit", {"initializer_range": 0}, "init_method_std must be a number above 0, got 0"),
    ],
)
def test_refusals_name_key_and_value(size: str, change: dict[str, Any], text: str) -> None:
    kind, released = RELEASED[size]
    with pytest.raises(ConfigError, match=text):
        kind.from_hf({**released, **change})


def test_projector_refusals() -> None:
    with pytest.raises(ConfigError, match="normalization must be one of LayerNorm, RMSNorm, got 'batch'") as caught:
        QwenMlpAdapterConfig(input_size=0, normalization="batch", init_method_std=-1)  # pyright: ignore[reportArgumentType]
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="'out_hidden_size' is missing in vision_config"):
        QwenMlpAdapterConfig.from_hf({"hidden_size": 4})
