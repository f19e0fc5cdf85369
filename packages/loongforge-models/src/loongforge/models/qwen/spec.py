"""Registration of the first Qwen family."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="qwen",
    api=(1, 0),
    modality="text",
    sizes=("qwen_1_8b", "qwen_7b", "qwen_14b", "qwen_72b"),
    configs="configs",
    config=Lazy("loongforge.models.qwen.config:QwenConfig"),
    build=Lazy("loongforge.models.qwen.model:build"),
    weights=Lazy("loongforge.models.qwen.weights:weights"),
    hf_architectures=("QWenLMHeadModel",),
    extra="qwen",
    summary="The first Qwen language models, 1.8B to 72B, in the format of their release.",
)
