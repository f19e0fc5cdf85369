"""Registration of the dense Qwen3 family."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="qwen3",
    api=(1, 0),
    modality="text",
    sizes=("qwen3_0_6b", "qwen3_1_7b", "qwen3_4b", "qwen3_8b", "qwen3_14b", "qwen3_32b"),
    configs="configs",
    config=Lazy("loongforge.models.qwen3.config:Qwen3Config"),
    build=Lazy("loongforge.models.qwen3.model:build"),
    weights=Lazy("loongforge.models.qwen3.weights:weights"),
    hf_architectures=("Qwen3ForCausalLM",),
    extra="qwen",
    summary="Dense Qwen3 language models, 0.6B to 32B.",
)
