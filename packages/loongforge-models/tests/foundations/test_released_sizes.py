"""Every shipped size is the released model: `config.json` in both directions, transformers' reading, its parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from released import FAMILIES, SIZES

from loongforge.core import plugins
from loongforge.core.config.resolve import resolve
from loongforge.core.model.geometry import TransformerGeometry


def folder(family: str) -> Path:
    return Path(str(files(f"loongforge.models.{family}")))


@pytest.mark.parametrize("family", FAMILIES)
def test_spec_files_and_releases_name_the_same_sizes(family: str) -> None:
    spec = plugins.load("models", family)
    stems = sorted(path.stem for path in (folder(family) / "configs").glob("*.yaml"))
    assert sorted(spec.sizes) == stems == sorted(size for owner, size in SIZES if owner == family)


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_yaml_is_the_released_model(family: str, size: str, released: Mapping[str, Any]) -> None:
    """As a run has it, and every field said in the file: a model config is complete."""
    config = resolve(["--model-name", size, "--train-iters", "1"], note=lambda _: None).model.foundation.geometry
    assert config == type(config).from_hf(released[size])
    assert isinstance(config.geometry(), TransformerGeometry)
    said = set(yaml.safe_load((folder(family) / "configs" / f"{size}.yaml").read_text()))
    needed = {"rotary_base", "norm_epsilon", "max_position_embeddings", "tie_word_embeddings", "vocab_size"}
    assert needed <= said
    if config.geometry().experts:
        assert {"num_experts", "moe_router_topk"} <= said
        assert "moe_ffn_hidden_size" in said or "moe_ffn_hidden_size" not in type(config).__dataclass_fields__


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_to_hf_is_the_released_file(family: str, size: str, released: Mapping[str, Any]) -> None:
    kind = plugins.load("models", family).config()
    written = json.loads(json.dumps(kind.from_hf(released[size]).to_hf()))
    for key, value in released[size].items():
        if key in written:
            assert written[key] == FAMILIES[family].expected.get(key, value), key
        else:
            assert key in FAMILIES[family].free or key in kind.KEYS.only or key in kind.KEYS.special, key
    assert kind.from_hf(written).to_hf() == written


@pytest.mark.parametrize(("family", "size"), [one for one in SIZES if FAMILIES[one[0]].transformers])
def test_transformers_reads_what_we_write_and_counts_the_same(
    family: str, size: str, released: Mapping[str, Any], parameters: Mapping[str, int]
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = plugins.load("models", family).config()
    config = kind.from_hf(released[size])
    theirs = AutoConfig.for_model(**config.to_hf())
    assert kind.from_hf(theirs.to_dict()) == config
    assert (
        kind.from_hf(AutoConfig.for_model(**{**released[size], "model_type": kind.KEYS.model_type}).to_dict()) == config
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters[size]


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_the_page_of_the_family_says_how_many(family: str, size: str, parameters: Mapping[str, int]) -> None:
    assert f"{parameters[size]:,}".replace(",", " ") in (folder(family) / "README.md").read_text()
