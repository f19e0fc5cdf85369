"""Registration of the DeepSeek-V3.2 family; module and weight table are those of DeepSeek-V3, which know an indexer."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="deepseek32",
    api=(1, 0),
    modality="text",
    sizes=("deepseek_v3_2",),
    configs="configs",
    config=Lazy("loongforge.models.deepseek32.config:DeepSeek32Config"),
    build=Lazy("loongforge.models.deepseek3.model:build"),
    weights=Lazy("loongforge.models.deepseek3.weights:weights"),
    hf_architectures=("DeepseekV32ForCausalLM",),
    extra="deepseek",
    summary="DeepSeek-V3.2, 671B-A37B: DeepSeek-V3 with sparse attention to the keys that an indexer chooses.",
)
