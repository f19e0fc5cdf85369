"""Registration of the MiniMax-M2 family."""

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="minimax_m2",
    api=(1, 0),
    modality="text",
    sizes=(
        "minimax_m2_230b_a10b",
        "minimax_m2_1_230b_a10b",
        "minimax_m2_5_230b_a10b",
        "minimax_m2_7_230b_a10b",
    ),
    configs="configs",
    config=Lazy("loongforge.models.minimax_m2.config:MiniMaxM2Config"),
    build=Lazy("loongforge.models.minimax_m2.model:build"),
    weights=Lazy("loongforge.models.minimax_m2.weights:weights"),
    hf_architectures=("MiniMaxM2ForCausalLM",),
    extra="minimax",
    summary="MiniMax-M2, M2.1, M2.5 and M2.7, 230B-A10B: grouped-query attention normalised over all heads, "
    "sigmoid-routed experts.",
)
