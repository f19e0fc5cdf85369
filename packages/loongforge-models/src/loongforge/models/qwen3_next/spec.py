"""Registration of the Qwen3-Next family."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="qwen3_next",
    api=(1, 0),
    modality="text",
    sizes=("qwen3_next_80b_a3b",),
    configs="configs",
    config=Lazy("loongforge.models.qwen3_next.config:Qwen3NextConfig"),
    build=Lazy("loongforge.models.qwen3_next.model:build"),
    weights=Lazy("loongforge.models.qwen3_next.weights:weights"),
    groups=("qwen3",),
    hf_architectures=("Qwen3NextForCausalLM",),
    extra="qwen",
    summary="Qwen3-Next, 80B-A3B: gated delta rule in three layers of four, gated attention, 512 experts.",
)
