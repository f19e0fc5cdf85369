"""Registration of the Qwen vision models' projector."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="qwen_mlp_adapter",
    api=(1, 0),
    modality="vision",
    sizes=("qwen_mlp_adapter", "qwen2_5_mlp_adapter"),
    configs="configs",
    config=Lazy("loongforge.models.vision.qwen_mlp_adapter.config:QwenMlpAdapterConfig"),
    build=Lazy("loongforge.models.vision.qwen_mlp_adapter.model:build"),
    weights=Lazy("loongforge.models.vision.qwen_mlp_adapter.weights:weights"),
    role="image_projector",
    groups=("image_projector",),
    extra="qwen",
    summary="Projector of Qwen2.5-VL and Qwen3-VL: squares of patches through a two-layer MLP.",
)
