"""The Qwen3 geometry: released values, both directions of config.json, refusals."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from loongforge.core.errors import ConfigError
from loongforge.models.qwen3.config import Qwen3Config
from loongforge.models.qwen3.spec import FAMILY

CONFIGS = Path(str(files("loongforge.models.qwen3"))) / "configs"

SHARED: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def released(layers: int, hidden: int, ffn: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        **SHARED,
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


RELEASED = {
    "qwen3_0_6b": released(28, 1024, 3072, 16, True),
    "qwen3_1_7b": released(28, 2048, 6144, 16, True),
    "qwen3_4b": released(36, 2560, 9728, 32, True),
    "qwen3_8b": released(36, 4096, 12288, 32, False),
    "qwen3_14b": released(40, 5120, 17408, 40, False),
    "qwen3_32b": released(64, 5120, 25600, 64, False),
}


def from_yaml(size: str) -> Qwen3Config:
    values = yaml.safe_load((CONFIGS / f"{size}.yaml").read_text())
    assert values.pop("family") == "qwen3"
    return Qwen3Config(**values)


def test_spec_yaml_and_releases_name_the_same_sizes() -> None:
    assert sorted(FAMILY.sizes) == sorted(path.stem for path in CONFIGS.glob("*.yaml")) == sorted(RELEASED)


@pytest.mark.parametrize("size", RELEASED)
def test_yaml_is_the_released_model(size: str) -> None:
    assert from_yaml(size) == Qwen3Config.from_hf(RELEASED[size])


@pytest.mark.parametrize("size", RELEASED)
def test_to_hf_is_the_released_file(size: str) -> None:
    written = Qwen3Config.from_hf(RELEASED[size]).to_hf()
    dropped = {"torch_dtype", "transformers_version"}
    assert written == {key: value for key, value in RELEASED[size].items() if key not in dropped}
    assert Qwen3Config.from_hf(written).to_hf() == written


@pytest.mark.parametrize("size", RELEASED)
def test_parameter_count_equals_transformers(size: str) -> None:
    import torch
    from transformers import Qwen3Config as HFConfig
    from transformers import Qwen3ForCausalLM

    config = from_yaml(size)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(HFConfig(**config.to_hf()))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == parameters(config)
    readme = Path(str(files("loongforge.models.qwen3"))) / "README.md"
    assert f"{count:,}".replace(",", " ") in readme.read_text()


def parameters(c: Qwen3Config) -> int:
    """Counted by hand from the geometry."""
    attention = (2 * c.num_attention_heads + 2 * c.num_query_groups) * c.kv_channels * c.hidden_size
    layer = attention + 3 * c.hidden_size * c.ffn_hidden_size + 2 * c.kv_channels + 2 * c.hidden_size
    embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    return c.num_layers * layer + embeddings + c.hidden_size


def test_transformers_reads_what_is_written_and_back() -> None:
    from transformers import Qwen3Config as HFConfig

    config = Qwen3Config(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=10,
        vocab_size=101,
        max_position_embeddings=64,
        norm_epsilon=1e-5,
        rotary_base=12345.0,
        tie_word_embeddings=True,
        init_method_std=0.03,
        attention_dropout=0.1,
        eos_token_id=(7, 9),
        pad_token_id=3,
    )
    theirs = HFConfig(**config.to_hf())
    assert theirs.to_dict()["rope_parameters"]["rope_theta"] == 12345.0
    assert (theirs.head_dim, theirs.num_key_value_heads, theirs.eos_token_id) == (10, 2, [7, 9])
    assert Qwen3Config.from_hf(theirs.to_dict()) == config
    assert Qwen3Config.from_hf(theirs.to_diff_dict()) == config


def test_both_spellings_of_the_rotary_base() -> None:
    base = {key: value for key, value in RELEASED["qwen3_8b"].items() if key not in ("rope_theta", "rope_scaling")}
    new = {**base, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert Qwen3Config.from_hf(new).rotary_base == 5e5
    assert Qwen3Config.from_hf({**base, "rope_theta": 5e5}).rotary_base == 5e5
    assert Qwen3Config.from_hf(base).rotary_base == 10000.0  # transformers' default


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden_sise": 4}, r"unknown key 'hidden_sise' \(value 4\) for qwen3\. Did you mean 'hidden_size'\?"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            r"rope_scaling.rope_type='yarn' is not supported, only 'default'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta=1000000 contradicts"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported, only False"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"layer_types": ["full_attention"] * 35 + ["sliding_attention"]}, "layer_types has .*sliding_attention"),
        ({"layer_types": ["full_attention"] * 35}, "layer_types has 35 entries for 36 layers"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config with .*load the original checkpoint"),
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not 'qwen3'"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "lacks 'Qwen3ForCausalLM'"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' is missing"),
        ({"num_attention_heads": 30}, "num_attention_heads=30 must be a multiple of num_query_groups=8"),
        ({"head_dim": 127}, "kv_channels=127 must be even"),
        ({"hidden_size": "4096"}, "hidden_size must be a whole number of at least 1, got '4096'"),
        ({"rms_norm_eps": 0}, "norm_epsilon must be a number above 0, got 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
    ],
)
def test_refusals_name_key_and_value(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Qwen3Config.from_hf({**RELEASED["qwen3_8b"], **change})


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Qwen3Config.from_hf({**RELEASED["qwen3_8b"], "attention_bias": True, "nonsense": 1, "hidden_act": "relu"})
    assert len(caught.value.problems) == 3
