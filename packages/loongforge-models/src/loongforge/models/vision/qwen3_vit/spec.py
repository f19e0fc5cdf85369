"""Registration of Qwen3-VL's vision encoder."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="qwen3_vit",
    api=(1, 0),
    modality="vision",
    sizes=("qwen3_vit", "qwen3_vit_small"),
    configs="configs",
    config=Lazy("loongforge.models.vision.qwen3_vit.config:Qwen3VitConfig"),
    build=Lazy("loongforge.models.vision.qwen3_vit.model:build"),
    weights=Lazy("loongforge.models.vision.qwen3_vit.weights:weights"),
    role="image_encoder",
    groups=("image_encoder",),
    extra="qwen",
    summary="Vision encoder of Qwen3-VL: learned positions, LayerNorm, deepstack.",
)
