"""Registration of the GLM-4.5 family."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="glm4_moe",
    api=(1, 0),
    modality="text",
    sizes=("glm_4_5_air_106b_a12b", "glm_4_5_355b_a32b"),
    configs="configs",
    config=Lazy("loongforge.models.glm4_moe.config:Glm4MoeConfig"),
    build=Lazy("loongforge.models.glm4_moe.model:build"),
    weights=Lazy("loongforge.models.glm4_moe.weights:weights"),
    hf_architectures=("Glm4MoeForCausalLM",),
    extra="glm",
    summary="GLM-4.5 and GLM-4.5-Air, 355B-A32B and 106B-A12B: grouped-query attention, sigmoid-routed experts.",
)
