"""Registration of the encoder, and of a model that has it."""

from loongforge.core.plugins import Composition, Lazy, ModelFamily

ENCODER = ModelFamily(
    name="acme_vit",
    api=(1, 0),
    modality="vision",
    role="image_encoder",
    groups=("image_encoder",),
    sizes=("acme_vit_tiny", "acme_vit_base"),
    configs="configs",
    config=Lazy("acme_vision.config:AcmeVitConfig"),
    build=Lazy("acme_vision.model:build"),
    weights=Lazy("acme_vision.weights:weights"),
    summary="Acme's vision encoder: still images, patches of 14 pixels.",
)

COMPOSITION = Composition(
    name="acme_vl",
    api=(1, 0),
    modality="vision-language",
    processor=Lazy("acme_vision.processor:processor"),
    sizes=("acme_vl_tiny",),
    configs="wholes",
    summary="Acme's encoder before any language model.",
)
