"""Registration of the InternLM2.5 family."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="internlm2",
    api=(1, 0),
    modality="text",
    sizes=("internlm2_5_1_8b", "internlm2_5_7b", "internlm2_5_20b"),
    configs="configs",
    config=Lazy("loongforge.models.internlm2.config:InternLM2Config"),
    build=Lazy("loongforge.models.internlm2.model:build"),
    weights=Lazy("loongforge.models.internlm2.weights:weights"),
    hf_architectures=("InternLM2ForCausalLM",),
    groups=("internlm2_5",),
    extra="internlm",
    summary="Dense InternLM2.5 language models, 1.8B to 20B.",
)
