"""Registration of the LLaMA family."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="llama",
    api=(1, 0),
    modality="text",
    sizes=(
        "llama2_7b",
        "llama2_13b",
        "llama2_70b",
        "llama3_8b",
        "llama3_70b",
        "llama3_1_8b",
        "llama3_1_70b",
        "llama3_1_405b",
        "llama3_2_1b",
        "llama3_2_3b",
    ),
    configs="configs",
    config=Lazy("loongforge.models.llama.config:LlamaConfig"),
    build=Lazy("loongforge.models.llama.model:build"),
    weights=Lazy("loongforge.models.llama.weights:weights"),
    hf_architectures=("LlamaForCausalLM",),
    groups=("llama2", "llama3"),
    extra="llama",
    summary="LLaMA 2, 3, 3.1 and 3.2 language models, 1B to 405B.",
)
