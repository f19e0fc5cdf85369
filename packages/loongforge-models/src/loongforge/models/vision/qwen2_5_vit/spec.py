"""Registration of Qwen2.5-VL's vision encoder."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="qwen2_5_vit",
    api=(1, 0),
    modality="vision",
    sizes=("qwen2_5_vit", "qwen2_5_vit_wide"),
    configs="configs",
    config=Lazy("loongforge.models.vision.qwen2_5_vit.config:Qwen2_5VitConfig"),
    build=Lazy("loongforge.models.vision.qwen2_5_vit.model:build"),
    weights=Lazy("loongforge.models.vision.qwen2_5_vit.weights:weights"),
    role="image_encoder",
    groups=("image_encoder",),
    extra="qwen",
    summary="Vision encoder of Qwen2.5-VL: windows, RMSNorm, SwiGLU.",
)
