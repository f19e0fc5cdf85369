"""Registration of the LLaMA family."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="acme_llama",
    api=(1, 0),
    modality="text",
    sizes=("acme_llama_tiny", "acme_llama_1b"),
    configs="configs",
    config=Lazy("acme_llama.config:LlamaConfig"),
    build=Lazy("acme_llama.model:build"),
    weights=Lazy("acme_llama.weights:weights"),
    hf_architectures=("LlamaForCausalLM",),
    summary="LLaMA language models by Acme.",
)
