"""Components that do not fit are refused with both sides named; those that fit are not."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from loongforge.core.config.run import ComponentConfig, ModelConfig
from loongforge.core.model.geometry import EncoderGeometry, ProjectorGeometry, TransformerGeometry
from loongforge.core.model.negotiate import negotiate

ENCODER = EncoderGeometry(
    num_layers=5, hidden_size=24, ffn_hidden_size=40, num_attention_heads=3, patch_dim=12, spatial_merge_size=2,
    normalization="LayerNorm", norm_epsilon=1e-6, gated=False, patch_bias=True, linear_bias=True,
    deepstack_layers=(1, 3),
)  # fmt: skip
PROJECTOR = ProjectorGeometry(input_size=None, output_size=None, normalization="LayerNorm", norm_epsilon=1e-6)
FOUNDATION = TransformerGeometry(
    num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    vocab_size=50, max_position_embeddings=64, norm_epsilon=1e-6, rotary_base=1e4, tie_word_embeddings=False,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A family's config that has its geometry ready."""

    ready: Any

    def geometry(self) -> Any:
        return self.ready


def component(family: str, geometry: Any, **fields: Any) -> ComponentConfig:
    return ComponentConfig(family=family, geometry=Shape(ready=geometry), **fields)


def model(**changed: Any) -> ModelConfig:
    parts: dict[str, Any] = {
        "image_encoder": component("vit", ENCODER),
        "image_projector": component("mlp", PROJECTOR),
        "foundation": component("lm", FOUNDATION),
        "model_type": "acme_vl",
    }
    return ModelConfig(**{**parts, **changed})


SPEC = """
from loongforge.core.plugins import Composition, Lazy

VL = Composition(name="acme_vl", api=(1, 0), modality="vision-language", processor=Lazy("nothing:at_all"))
"""


@pytest.fixture(autouse=True)
def composition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel that registers one composition, `acme_vl`."""
    info = tmp_path / "acme_pictures-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-pictures\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[loongforge.compositions]\nacme_vl = acme_pictures:VL\n")
    (tmp_path / "acme_pictures.py").write_text(SPEC)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "acme_pictures", raising=False)


def test_what_fits_has_no_problem() -> None:
    assert negotiate(model()) == []
    stated = replace(PROJECTOR, input_size=24, output_size=32)
    assert negotiate(model(image_projector=component("mlp", stated))) == []
    three_rows = replace(FOUNDATION, mrope_section=(2, 1, 1))
    assert negotiate(model(foundation=component("lm", three_rows))) == []


def test_a_foundation_alone_needs_no_composition() -> None:
    alone = ModelConfig(foundation=component("lm", FOUNDATION), model_type="anything")
    assert negotiate(alone) == []


def test_a_width_that_differs_names_both_sides() -> None:
    stated = replace(PROJECTOR, input_size=25, output_size=33)
    assert negotiate(model(image_projector=component("mlp", stated))) == [
        "model.image_projector (mlp) states input_size=25, but model.image_encoder (vit) has hidden_size=24: set "
        "model.image_projector.input_size=null to take it from there, or choose a projector of this width.",
        "model.image_projector (mlp) states output_size=33, but model.foundation (lm) has hidden_size=32: set "
        "model.image_projector.output_size=null to take it from there, or choose a projector of this width.",
    ]


def test_more_feature_levels_than_layers() -> None:
    shallow = component("lm", replace(FOUNDATION, num_layers=1))
    (problem,) = negotiate(model(foundation=shallow))
    assert problem.startswith(
        "model.image_encoder (vit) hands features of 2 of its layers to the first layers of the foundation, but "
        "model.foundation (lm) has num_layers=1: "
    )


def test_the_composition_must_be_there() -> None:
    (problem,) = negotiate(model(model_type=None))
    assert "how images are prepared: name one of acme_vl" in problem
    (problem,) = negotiate(model(model_type="acme_vll"))
    assert problem.startswith("model.model_type: no composition 'acme_vll'. Did you mean 'acme_vl'? Known: acme_vl")


def test_one_without_the_other() -> None:
    assert negotiate(model(image_projector=None)) == [
        "model.image_encoder needs a model.image_projector beside it: add one, or leave both out."
    ]
    assert negotiate(model(image_encoder=None)) == [
        "model.image_projector needs a model.image_encoder beside it: add one, or leave both out."
    ]
