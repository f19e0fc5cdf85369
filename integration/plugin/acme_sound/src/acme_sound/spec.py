"""Registration of the ear, and of a model that has it."""

from loongforge.core.plugins import Composition, Lazy, ModelFamily

ENCODER = ModelFamily(
    name="acme_ear",
    api=(1, 0),
    modality="audio",
    role="image_encoder",  # the slot of whatever is perceived
    groups=("image_encoder",),
    sizes=("acme_ear_tiny",),
    configs="configs",
    config=Lazy("acme_sound.config:AcmeEarConfig"),
    build=Lazy("acme_sound.model:build"),
    weights=Lazy("acme_sound.model:weights"),
    summary="Acme's ear: windows of 10 ms, attention within a sound.",
)

COMPOSITION = Composition(
    name="acme_hears",
    api=(1, 0),
    modality="audio-language",
    processor=Lazy("acme_sound.processor:processor"),
    sizes=("acme_hears_tiny",),
    configs="wholes",
    summary="Acme's ear before any language model.",
)
