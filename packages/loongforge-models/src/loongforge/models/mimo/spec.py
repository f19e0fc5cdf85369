"""Registration of the MiMo family."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="mimo",
    api=(1, 0),
    modality="text",
    sizes=("mimo_7b",),
    configs="configs",
    config=Lazy("loongforge.models.mimo.config:MiMoConfig"),
    build=Lazy("loongforge.models.mimo.model:build"),
    weights=Lazy("loongforge.models.mimo.weights:weights"),
    hf_architectures=("MiMoForCausalLM",),
    extra="mimo",
    summary="MiMo-7B: dense, with a further layer for multi-token prediction.",
)
