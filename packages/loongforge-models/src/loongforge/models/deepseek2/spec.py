"""Registration of the DeepSeek-V2 family."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="deepseek2",
    api=(1, 0),
    modality="text",
    sizes=("deepseek_v2_lite", "deepseek_v2"),
    configs="configs",
    config=Lazy("loongforge.models.deepseek2.config:DeepSeek2Config"),
    build=Lazy("loongforge.models.deepseek2.model:build"),
    weights=Lazy("loongforge.models.deepseek2.weights:weights"),
    hf_architectures=("DeepseekV2ForCausalLM",),
    extra="deepseek",
    summary="DeepSeek-V2 and V2-Lite, 236B-A21B and 16B-A2.4B: multi-head latent attention and experts in groups.",
)
