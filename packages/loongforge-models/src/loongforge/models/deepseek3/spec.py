"""Registration of the DeepSeek-V3 family."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="deepseek3",
    api=(1, 0),
    modality="text",
    sizes=("deepseek_v3", "kimi_k2"),
    configs="configs",
    config=Lazy("loongforge.models.deepseek3.config:DeepSeek3Config"),
    build=Lazy("loongforge.models.deepseek3.model:build"),
    weights=Lazy("loongforge.models.deepseek3.weights:weights"),
    hf_architectures=("DeepseekV3ForCausalLM",),
    groups=("kimi_k2",),
    extra="deepseek",
    summary="DeepSeek-V3, 671B-A37B, and Kimi-K2, 1T-A32B: multi-head latent attention and sigmoid-routed experts.",
)
