"""Tiny wholes of transformers: names under the prefixes of the whole, both spellings, refusals, other components."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loongforge.core import plugins
from loongforge.core.errors import ConfigError
from loongforge.core.model.weights import Copy, FuseGateUp, FuseQKV, SplitQKV, StackedExperts

TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [4, 3, 1]},
}
VISION: dict[str, Any] = {"depth": 3, "hidden_size": 32, "intermediate_size": 44, "num_heads": 4, "out_hidden_size": 48}
VISION3 = {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 22}

TINY: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": ("qwen2_5_vl", TEXT, {**VISION, "fullatt_block_indexes": [1], "tokens_per_second": 2}),
    "qwen3_vl": ("qwen3_vl", TEXT, VISION3),
    "qwen3_vl_moe": ("qwen3_vl_moe", {**TEXT, **EXPERTS}, VISION3),
}
ARCHITECTURES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}


def saved(name: str, directory: Path, *, tied: bool) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """`config.json` and the shapes of all tensors as transformers writes them."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForImageTextToText

    kind, text, vision = TINY[name]
    config = AutoConfig.for_model(kind, text_config=dict(text), vision_config=dict(vision), tie_word_embeddings=tied)
    AutoModelForImageTextToText.from_config(config).save_pretrained(directory)
    with safe_open(directory / "model.safetensors", "pt") as file:
        shapes = {one: tuple(file.get_slice(one).get_shape()) for one in file.keys()}  # noqa: SIM118 - no dict
    return json.loads((directory / "config.json").read_text()), shapes


def renamed(prefixes: tuple[tuple[str, str], ...], name: str) -> str | None:
    return next((there + name[len(here) :] for here, there in prefixes if name.startswith(here)), None)


def rules_by_hf_name(spec: Any, model: Any) -> list[tuple[str, Any]]:
    """Pattern of every Hugging Face name in the whole, with its rule."""
    prefixes = spec.prefixes()(model)
    found: list[tuple[str, Any]] = []
    for slot, component in model.components.items():
        for rule in plugins.load("models", component.family).weights()(component.geometry).rules:
            if "layer_norm_weight" in rule.megatron:
                continue
            match rule:
                case Copy() | SplitQKV() | StackedExperts():
                    names = (rule.hf,)
                case FuseQKV():
                    names = (rule.q, rule.k, rule.v)
                case FuseGateUp():
                    names = (rule.gate, rule.up)
            for name in names:
                whole = renamed(prefixes[slot], name)
                assert whole is not None, f"{slot}: no prefix for {name}"
                found.append((re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(whole)), rule))
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_every_saved_tensor_has_one_rule_and_every_rule_a_tensor(
    name: str, tied: bool, tmp_path: Path, typed: Any
) -> None:
    hf, shapes = saved(name, tmp_path, tied=tied)
    spec = plugins.load("compositions", name)
    model = typed({"model_type": name, **spec.components()(hf)})
    rules = rules_by_hf_name(spec, model)
    if tied:
        rules = [one for one in rules if one[1].megatron != "output_layer.weight"]
    for tensor, shape in shapes.items():
        claims = [rule for pattern, rule in rules if re.fullmatch(pattern, tensor)]
        assert len(claims) == 1, (tensor, claims)
        if isinstance(claims[0], StackedExperts):
            inner, outer = (48, 44) if claims[0].gate_up else (22, 48)
            assert shape == ((5, inner, outer) if claims[0].transposed else (5, outer, inner))
    idle = [rule.megatron for pattern, rule in rules if not any(re.fullmatch(pattern, one) for one in shapes)]
    assert idle == [one for one in idle if one.startswith("deepstack_mergers") and name == "qwen2_5_vl"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_config_travels_both_ways(name: str, tied: bool, tmp_path: Path, typed: Any) -> None:
    from transformers import AutoConfig

    hf, _ = saved(name, tmp_path, tied=tied)
    spec = plugins.load("compositions", name)
    section = spec.components()(hf)
    assert section["foundation"]["tie_word_embeddings"] is tied
    model = typed({"model_type": name, **section})
    written = json.loads(json.dumps(spec.to_hf()(model)))
    assert written["architectures"] == [ARCHITECTURES[name]]
    assert spec.components()(written) == section
    assert spec.components()(AutoConfig.for_model(**written).to_dict()) == section
    # As an export lies over the file it came from.
    assert spec.components()({**hf, **written}) == section


def test_spelling_of_positions_tells_the_order_of_experts(tmp_path: Path, typed: Any) -> None:
    """The hub's files are transposed and older, those of transformers 5 are neither."""
    hf, _ = saved("qwen3_vl_moe", tmp_path, tied=False)
    spec = plugins.load("compositions", "qwen3_vl_moe")
    assert spec.components()(hf)["foundation"]["expert_layout"] == "stacked"
    text = dict(hf["text_config"])
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "norm_topk_prob": True}
    older = {**hf, "text_config": text}
    section = spec.components()(older)
    assert section["foundation"]["expert_layout"] == "stacked_transposed"
    written = spec.to_hf()(typed({"model_type": "qwen3_vl_moe", **section}))
    assert "rope_parameters" not in written["text_config"]
    assert spec.components()(written) == section


def test_flat_file_of_the_hub_and_one_with_a_section_are_one_model(tmp_path: Path) -> None:
    hf, _ = saved("qwen2_5_vl", tmp_path, tied=False)
    components = plugins.load("compositions", "qwen2_5_vl").components()
    text = {key: value for key, value in hf["text_config"].items() if key != "model_type"}
    flat = {**{key: value for key, value in hf.items() if key != "text_config"}, **text}
    assert components(flat) == components(hf)
    assert components({**flat, "text_config": hf["text_config"]}) == components(hf)
    later = {**hf["text_config"], "image_token_id": None, "vision_start_token_id": 151652, "architectures": ["Whole"]}
    assert components({**hf, "text_config": later}) == components(hf)
    with pytest.raises(ConfigError, match="unknown key 'hidden_sise'"):
        components({**flat, "hidden_sise": 3})


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("qwen3_vl", {"image_token_idd": 3}, "unknown key 'image_token_idd'.*Did you mean 'image_token_id'"),
        ("qwen3_vl", {"quantization_config": {"bits": 4}}, "quantization_config with .*load the original checkpoint"),
        ("qwen3_vl", {"vision_config": None}, "'vision_config' is missing"),
        ("qwen3_vl", {"text_config": 4}, "text_config must be an object, got 4"),
        ("qwen3_vl", {"text_config": {"mrope_interleaved": False}}, "mrope_interleaved=False is not supported"),
        ("qwen3_vl", {"text_config": {"rope_theta": None}}, "text_config.rope_theta is missing"),
        ("qwen2_5_vl", {"text_config": {"mrope_section": None}}, "lacks rope_scaling.mrope_section"),
        ("qwen2_5_vl", {"model_type": "qwen2_vl"}, "model_type 'qwen2_vl' is not 'qwen2_5_vl'"),
    ],
)
def test_refusals(name: str, change: dict[str, Any], text: str, tmp_path: Path) -> None:
    hf, _ = saved(name, tmp_path, tied=False)
    section = change.get("text_config")
    if isinstance(section, dict):
        rope = {**hf["text_config"]["rope_parameters"], **section}
        kept = {key: value for key, value in rope.items() if value is not None}
        change = {"text_config": {**hf["text_config"], "rope_parameters": kept}}
    with pytest.raises(ConfigError, match=text):
        plugins.load("compositions", name).components()({**hf, **change})


def test_other_components_have_no_architecture(tmp_path: Path, typed: Any) -> None:
    hf, _ = saved("qwen3_vl_moe", tmp_path, tied=False)
    spec = plugins.load("compositions", "qwen3_vl")  # the foundation tells the two architectures apart
    model = typed({"model_type": "qwen3_vl", **spec.components()(hf)})
    assert spec.to_hf()(model)["model_type"] == "qwen3_vl_moe"
    foundation = model.foundation

    def with_fields(**values: Any) -> Any:
        return replace(model, foundation=replace(foundation, geometry=replace(foundation.geometry, **values)))

    assert spec.to_hf()(with_fields(mrope_section=None, mrope_interleaved=False)) is None
    assert spec.to_hf()(with_fields(mrope_interleaved=False)) is None
    assert spec.to_hf()(with_fields(expert_layout="per_expert")) is None
    assert spec.to_hf()(with_fields(moe_router_pre_softmax=True)) is None
    assert spec.to_hf()(replace(model, foundation=replace(foundation, family="llama"))) is None
    assert (
        spec.to_hf()(replace(model, foundation=replace(foundation, family="loongforge-models:qwen3_moe"))) is not None
    )
