"""Registration of the GLM-5 family; module and weight table are those of DeepSeek-V3, which know an indexer."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="glm5",
    api=(1, 0),
    modality="text",
    sizes=("glm_5", "glm_5_2"),
    configs="configs",
    config=Lazy("loongforge.models.glm5.config:Glm5Config"),
    build=Lazy("loongforge.models.deepseek3.model:build"),
    weights=Lazy("loongforge.models.deepseek3.weights:weights"),
    hf_architectures=("GlmMoeDsaForCausalLM",),
    extra="glm",
    summary="GLM-5 and GLM-5.2, 744B-A40B: sparse attention as in DeepSeek-V3.2, in GLM-5.2 with shared choices.",
)
