"""The section `lora`: its flags, what it refuses, and which modules its patterns mean."""

from __future__ import annotations

import pytest

from loongforge.core.config.lora import LoraConfig, Pattern, fits
from loongforge.core.config.resolve import resolve
from loongforge.core.errors import ConfigError

MODEL = ["--model-name", "qwen3-0.6b", "--train-iters", "3"]


def test_flags_and_overrides_write_the_section() -> None:
    flags = ["--lora-rank", "8", "--lora-dropout", "0.1", "--lora-target-modules", "q_proj", "v_proj"]
    section = resolve([*MODEL, *flags, "--lora-patterns", "*.mlp.* rank=4 alpha=8", "lora.alpha=16"]).lora
    expected = LoraConfig(
        rank=8, alpha=16.0, dropout=0.1, target_modules=("q_proj", "v_proj"), patterns=("*.mlp.* rank=4 alpha=8",)
    )
    assert section == expected
    assert section.rules() == (Pattern(pattern="*.mlp.*", rank=4, alpha=8.0),)
    assert not resolve(MODEL).lora.on


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora-rank", "0"], "lora.rank: must be at least 1, got 0"),
        (["--lora-rank", "2", "--lora-dropout", "1"], "must be in [0, 1), got 1.0"),
        (["--lora-rank", "2", "--lora-patterns", "q_proj"], "a pattern and at least one number are needed"),
        (["--lora-rank", "2", "--lora-patterns", "q_proj r=3"], "'r=3' is not rank=, alpha= or dropout="),
        (["--lora-rank", "2", "--lora-patterns", "q_proj rank=x"], "'rank=x' has no number that is a rank"),
        (["--lora-rank", "2", "--lora-target-modules", "re:("], "'re:(' is not a regular expression"),
        (["--lora-adapter-path", "nowhere"], "lora.adapter_path: 'nowhere' is no directory of adapters"),
    ],
)
def test_mistakes_are_said(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve([*MODEL, *flags])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("mlp.gate", "model.layers.3.mlp.gate", True),
        ("gate", "model.layers.3.mlp.gate_proj", False),
        ("layers.[02].*.q_proj", "model.layers.2.self_attn.q_proj", True),
        ("layers.[02].*.q_proj", "model.layers.1.self_attn.q_proj", False),
        (r"re:.*\.[02]\..*q_proj", "model.layers.2.self_attn.q_proj", True),
        (r"re:q_proj", "model.layers.2.self_attn.q_proj", False),
    ],
)
def test_a_pattern_is_the_end_of_a_name(pattern: str, module: str, *, expected: bool) -> None:
    assert fits(pattern, module) is expected
