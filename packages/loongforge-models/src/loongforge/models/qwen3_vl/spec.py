"""Registration of Qwen3-VL, dense and with experts."""

from loongforge.core.plugins import Composition, Lazy

TOKEN_IDS = (
    ("image_token_id", "<|image_pad|>"),
    ("video_token_id", "<|video_pad|>"),
    ("vision_start_token_id", "<|vision_start|>"),
    ("vision_end_token_id", "<|vision_end|>"),
)
"""Where `config.json` says which tokens stand for images and videos."""

COMPOSITION = Composition(
    name="qwen3_vl",
    api=(1, 0),
    modality="vision-language",
    processor=Lazy("loongforge.models.vision.processor:qwen3_vl"),
    sizes=("qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b", "qwen3_vl_32b"),
    configs="configs",
    components=Lazy("loongforge.models.qwen3_vl.hf:components"),
    to_hf=Lazy("loongforge.models.qwen3_vl.hf:to_hf"),
    prefixes=Lazy("loongforge.models.qwen3_vl.hf:prefixes"),
    hf_architectures=("Qwen3VLForConditionalGeneration",),
    token_ids=TOKEN_IDS,
    extra="qwen",
    summary="Qwen3-VL, 2B to 32B: images and videos, deepstack features, interleaved positions.",
)

WITH_EXPERTS = Composition(
    name="qwen3_vl_moe",
    api=(1, 0),
    modality="vision-language",
    processor=Lazy("loongforge.models.vision.processor:qwen3_vl"),
    sizes=("qwen3_vl_30b_a3b", "qwen3_vl_235b_a22b"),
    configs="configs_with_experts",
    components=Lazy("loongforge.models.qwen3_vl.hf:components"),
    to_hf=Lazy("loongforge.models.qwen3_vl.hf:to_hf"),
    prefixes=Lazy("loongforge.models.qwen3_vl.hf:prefixes"),
    hf_architectures=("Qwen3VLMoeForConditionalGeneration",),
    token_ids=TOKEN_IDS,
    extra="qwen",
    summary="Qwen3-VL with experts, 30B-A3B and 235B-A22B.",
)
