"""The kit fails a family with one mistake in it, acme-llama being right otherwise, and says which mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loongforge.core.testing import check_family
from loongforge.core.testing.conformance.transformers_side import UNKNOWN, WEIGHTS, run

Install = Callable[[str, str, str], None]

EARLY = {
    "heavy spec": (
        "spec.py",
        "FAMILY =",
        "import torch\n\nFAMILY =",
        r"'registration': acme_llama.spec imports .*torch",
    ),
    "size without file": ("spec.py", '"acme_llama_1b"', '"acme_llama_2b"', r"'sizes': no configs/acme_llama_2b.yaml"),
    "unlisted file": ("spec.py", ', "acme_llama_1b"', ",", r"'sizes': configs/acme_llama_1b.yaml is not in sizes"),
    "wrong key": (
        "configs/acme_llama_tiny.yaml",
        "hidden_size: 64",
        "hiden_size: 64",
        r"(?s)'sizes': .*hiden_size.*Did you mean 'hidden_size'",
    ),
    "wrong value": (
        "configs/acme_llama_tiny.yaml",
        "vocab_size: 512",
        "vocab_size: many",
        r"'sizes': .*vocab_size.*many",
    ),
    "mutable config": ("config.py", "frozen=True, slots=True, ", "slots=True, ", r"'configuration': .* is not frozen"),
    "an exception": (
        "config.py",
        '    "num_key_value_heads": "num_query_groups",\n',
        "",
        r"'configuration': TypeError: .*num_query_groups",
    ),
    "foreign architecture": ("config.py", '["LlamaForCausalLM"]', '["Llama"]', r"'configuration': .*\['Llama'\]"),
}


@pytest.mark.parametrize("mistake", EARLY)
def test_before_a_model_is_built(acme: Install, mistake: str) -> None:
    path, old, new, text = EARLY[mistake]
    acme(path, old, new)
    with pytest.raises(AssertionError, match=text):
        check_family("acme_llama")


LATE = {
    "lost field": (
        "config.py",
        '"rope_theta": self.rotary_base',
        '"rope_theta": 10000.0',
        r"'tiny model': .*changes rotary_base \(5000.0 becomes 10000.0\)",
    ),
    "missing rule": (
        "weights.py",
        'Copy(megatron=OURS + "pre_mlp_layernorm.weight", hf=before_mlp),',
        "",
        r"'weight table': .*parameter 'decoder.layers.0.pre_mlp_layernorm.weight' has no rule",
    ),
    "idle rule": (
        "weights.py",
        "rules=(",
        'rules=(Copy(megatron=ATTENTION + "q_layernorm.weight", hf=THEIRS + "self_attn.q_norm.weight"),',
        r"'weight table': .*q_layernorm.weight' names no parameter",
    ),
    "gate and up exchanged": ("weights.py", "gate=gate, up=up", "gate=up, up=gate", r"'transformers': .*logits differ"),
}


@pytest.mark.parametrize("mistake", LATE)
def test_when_weights_move(acme: Install, mistake: str) -> None:
    path, old, new, text = LATE[mistake]
    acme(path, old, new)
    with pytest.raises(AssertionError, match=text):
        check_family("acme_llama", tiny={"tie_word_embeddings": False})


def test_an_unknown_family_and_an_unknown_field(acme: Install) -> None:
    with pytest.raises(AssertionError, match=r"'acme_lama' fails the check 'registration': no model 'acme_lama'"):
        check_family("acme_lama")
    acme("spec.py", "by Acme.", "by Acme.")
    with pytest.raises(AssertionError, match=r"'tiny model': tiny: LlamaConfig has no field 'layers'"):
        check_family("acme_llama", tiny={"layers": 1})


def test_an_architecture_that_transformers_lacks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / WEIGHTS).mkdir()
    (tmp_path / WEIGHTS / "config.json").write_text('{"architectures": ["AcmeForCausalLM"]}')
    assert run([str(tmp_path)]) == UNKNOWN  # the exit code that becomes a skipped outcome of the report
    assert "has no class AcmeForCausalLM" in capsys.readouterr().err
