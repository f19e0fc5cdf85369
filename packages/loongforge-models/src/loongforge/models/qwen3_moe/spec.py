"""Registration of the Qwen3 mixture-of-experts family."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="qwen3_moe",
    api=(1, 0),
    modality="text",
    sizes=("qwen3_30b_a3b", "qwen3_235b_a22b", "qwen3_coder_30b_a3b", "qwen3_coder_480b_a35b"),
    configs="configs",
    config=Lazy("loongforge.models.qwen3_moe.config:Qwen3MoeConfig"),
    build=Lazy("loongforge.models.qwen3_moe.model:build"),
    weights=Lazy("loongforge.models.qwen3_moe.weights:weights"),
    groups=("qwen3",),
    hf_architectures=("Qwen3MoeForCausalLM",),
    extra="qwen",
    summary="Qwen3 and Qwen3-Coder with experts, 30B-A3B to 480B-A35B.",
)
