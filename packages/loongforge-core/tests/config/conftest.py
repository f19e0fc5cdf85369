"""A third party's wheel in miniature: a model family with two sizes, and a checkpoint format."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

CONFIG = '''
    """Geometry of a family that exists only in this test."""

    from __future__ import annotations

    from dataclasses import dataclass

    from loongforge.core.errors import ConfigError
    from loongforge.core.model.geometry import TransformerGeometry


    @dataclass(frozen=True, slots=True, kw_only=True)
    class AcmeConfig:
        """Sizes."""

        num_layers: int
        """Layers."""
        hidden_size: int
        num_attention_heads: int = 2
        vocab_size: int = 64
        rotary_base: float = 1e4
        tie_word_embeddings: bool = False
        qk_layernorm: bool = False

        def __post_init__(self) -> None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(f"hidden_size={self.hidden_size!r} must be a multiple of num_attention_heads.")

        @classmethod
        def from_hf(cls, hf):
            if "bits" in hf:
                raise ConfigError("config.json: bits is not supported.")
            return cls(num_layers=hf["n_layer"], hidden_size=hf["n_embd"], rotary_base=hf.get("rope_theta", 1e4))

        def to_hf(self):
            return {"architectures": ["AcmeForCausalLM"], "n_layer": self.num_layers, "n_embd": self.hidden_size}

        def geometry(self):
            return TransformerGeometry(
                num_layers=self.num_layers, hidden_size=self.hidden_size, ffn_hidden_size=4 * self.hidden_size,
                num_attention_heads=self.num_attention_heads, num_query_groups=self.num_attention_heads,
                kv_channels=self.hidden_size // self.num_attention_heads, vocab_size=self.vocab_size,
                max_position_embeddings=128, norm_epsilon=1e-6, rotary_base=self.rotary_base,
                tie_word_embeddings=self.tie_word_embeddings,
            )
'''

SPEC = """
    from loongforge.core.plugins import FormatSpec, Lazy, ModelFamily

    FAMILY = ModelFamily(
        name="acme", api=(1, 0), modality="text", sizes=("acme_0_1b", "acme_2b"), configs="configs",
        config=Lazy("acme_wheel.config:AcmeConfig"), build=Lazy("acme_wheel.nothing:build"),
        weights=Lazy("acme_wheel.nothing:weights"), hf_architectures=("AcmeForCausalLM",), summary="A test family.",
    )
    FORMAT = FormatSpec(
        name="acme_json", api=(1, 0), detect=Lazy("acme_wheel.files:detect"),
        read_config=Lazy("acme_wheel.files:read_config"), load=Lazy("acme_wheel.nothing:load"),
        save=Lazy("acme_wheel.nothing:save"),
    )
"""

FILES = """
    import json


    def detect(path):
        return (path / "acme.json").is_file()


    def read_config(path):
        return json.loads((path / "acme.json").read_text())
"""


@pytest.fixture(scope="session")
def acme_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for sys.path that holds the wheel, installed."""
    root = tmp_path_factory.mktemp("site")
    package = root / "acme_wheel"
    (package / "configs").mkdir(parents=True)
    for name, text in {"__init__": "", "config": CONFIG, "spec": SPEC, "files": FILES}.items():
        (package / f"{name}.py").write_text(textwrap.dedent(text))
    (package / "configs" / "acme_0_1b.yaml").write_text("family: acme\nnum-layers: 2\nhidden_size: 16\n")
    (package / "configs" / "acme_2b.yaml").write_text(
        "family: acme\nnum_layers: 4\nhidden_size: 32\nrotary_base: 1e6\n"
    )
    metadata = root / "acme_wheel-0.3.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-wheel\nVersion: 0.3.0\n")
    (metadata / "entry_points.txt").write_text(
        "[loongforge.models]\nacme = acme_wheel.spec:FAMILY\n"
        "[loongforge.checkpoints]\nacme_json = acme_wheel.spec:FORMAT\n"
    )
    return root


@pytest.fixture
def acme(acme_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel, on the path of this test; its directory."""
    monkeypatch.syspath_prepend(str(acme_folder))
    return acme_folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint directory in the wheel's format, with a tokenizer."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "acme.json").write_text(
        '{"architectures": ["AcmeForCausalLM"], "n_layer": 3, "n_embd": 24, "rope_theta": 5e5}'
    )
    (folder / "tokenizer.json").write_text("{}")
    return folder


VISION_CONFIG = '''
    """Shapes of a vision tower that exists only in this test."""

    from dataclasses import asdict, dataclass

    from acme_wheel.config import AcmeConfig
    from loongforge.core.model.geometry import EncoderGeometry, ProjectorGeometry


    @dataclass(frozen=True, slots=True, kw_only=True)
    class VitConfig:
        num_layers: int
        hidden_size: int
        deepstack_layers: tuple[int, ...] = ()
        patch_dim: int = 12

        def geometry(self):
            return EncoderGeometry(
                num_layers=self.num_layers, hidden_size=self.hidden_size, ffn_hidden_size=2 * self.hidden_size,
                num_attention_heads=2, patch_dim=self.patch_dim, spatial_merge_size=2, normalization="LayerNorm",
                norm_epsilon=1e-6, gated=False, patch_bias=True, linear_bias=True,
                deepstack_layers=self.deepstack_layers,
            )


    @dataclass(frozen=True, slots=True, kw_only=True)
    class AdapterConfig:
        input_size: int | None = None
        output_size: int | None = None

        def geometry(self):
            return ProjectorGeometry(
                input_size=self.input_size, output_size=self.output_size, normalization="LayerNorm", norm_epsilon=1e-6
            )


    def components(hf):
        vision = hf["vision"]
        return {
            "image_encoder": {"family": "acme_vit", "num_layers": vision["depth"], "hidden_size": vision["width"]},
            "image_projector": {"family": "acme_adapter"},
            "foundation": {"family": "acme", **asdict(AcmeConfig.from_hf(hf["text"]))},
        }
'''

VISION_SPEC = """
    from loongforge.core.plugins import Composition, Lazy, ModelFamily


    def family(name, config, sizes, **fields):
        return ModelFamily(
            name=name, api=(1, 0), modality="vision", sizes=sizes, configs="configs/" + name, config=Lazy(config),
            build=Lazy("acme_sight.nothing:build"), weights=Lazy("acme_sight.nothing:weights"), **fields,
        )


    VIT = family(
        "acme_vit", "acme_sight.config:VitConfig", ("acme_vit",), role="image_encoder", groups=("image_encoder",)
    )
    ADAPTER = family(
        "acme_adapter", "acme_sight.config:AdapterConfig", ("acme_adapter",), role="image_projector",
        groups=("image_projector",),
    )
    MOE = family("acme_moe", "acme_wheel.config:AcmeConfig", ("acme_8x1b",), groups=("acme",))
    VL = Composition(
        name="acme_vl", api=(1, 0), modality="vision-language", processor=Lazy("acme_sight.nothing:processor"),
        sizes=("acme_vl_1b",), configs="configs/acme_vl", components=Lazy("acme_sight.config:components"),
        hf_architectures=("AcmeVLForConditionalGeneration",), summary="A test composition.",
    )
"""

VISION_FILES = {
    "acme_vit/acme_vit": "family: acme_vit\nnum-layers: 3\nhidden_size: 10\ndeepstack_layers: [0, 1]\n",
    "acme_adapter/acme_adapter": "family: acme_adapter\ninput_size: null\noutput_size: null\n",
    "acme_moe/acme_8x1b": "family: acme_moe\nnum_layers: 5\nhidden_size: 40\nqk_layernorm: true\n",
    "acme_vl/acme_vl_1b": (
        "model_type: acme_vl\nimage_encoder: {family: acme_vit, num_layers: 2, hidden_size: 6}\n"
        "image_projector: {family: acme_adapter}\n"
        "foundation: {family: acme, num_layers: 2, hidden_size: 18, vocab_size: 77}\n"
    ),
}


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second wheel beside `acme`: an encoder, a projector, a further foundation, and a composition of them."""
    root = tmp_path_factory.mktemp("vision_site")
    package = root / "acme_sight"
    package.mkdir()
    for name, text in {"__init__": "", "config": VISION_CONFIG, "spec": VISION_SPEC, "nothing": ""}.items():
        (package / f"{name}.py").write_text(textwrap.dedent(text))
    for name, text in VISION_FILES.items():
        path = package / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    metadata = root / "acme_vision-0.4.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-vision\nVersion: 0.4.0\n")
    families = {"acme_vit": "VIT", "acme_adapter": "ADAPTER", "acme_moe": "MOE"}
    lines = ["[loongforge.models]", *(f"{name} = acme_sight.spec:{target}" for name, target in families.items())]
    lines += ["[loongforge.compositions]", "acme_vl = acme_sight.spec:VL"]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return root


@pytest.fixture
def vision(acme: Path, vision_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both wheels, on the path of this test; the directory of the second."""
    del acme
    monkeypatch.syspath_prepend(str(vision_folder))
    return vision_folder


@pytest.fixture
def whole_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint directory of the composition, in the first wheel's format."""
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "acme.json").write_text(
        '{"architectures": ["AcmeVLForConditionalGeneration"], "text": {"n_layer": 3, "n_embd": 24},'
        ' "vision": {"depth": 4, "width": 8}}'
    )
    (folder / "tokenizer.json").write_text("{}")
    return folder
