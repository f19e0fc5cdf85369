"""Registration of the dense Qwen1.5, Qwen2 and Qwen2.5 family."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="qwen2",
    api=(1, 0),
    modality="text",
    sizes=(
        "qwen1_5_0_5b",
        "qwen1_5_1_8b",
        "qwen1_5_4b",
        "qwen1_5_7b",
        "qwen1_5_14b",
        "qwen1_5_32b",
        "qwen1_5_72b",
        "qwen1_5_110b",
        "qwen2_0_5b",
        "qwen2_1_5b",
        "qwen2_7b",
        "qwen2_72b",
        "qwen2_5_0_5b",
        "qwen2_5_1_5b",
        "qwen2_5_3b",
        "qwen2_5_7b",
        "qwen2_5_14b",
        "qwen2_5_32b",
        "qwen2_5_72b",
    ),
    configs="configs",
    config=Lazy("loongforge.models.qwen2.config:Qwen2Config"),
    build=Lazy("loongforge.models.qwen2.model:build"),
    weights=Lazy("loongforge.models.qwen2.weights:weights"),
    hf_architectures=("Qwen2ForCausalLM",),
    groups=("qwen1_5", "qwen2_5"),
    extra="qwen",
    summary="Dense Qwen1.5, Qwen2 and Qwen2.5 language models, 0.5B to 110B.",
)
