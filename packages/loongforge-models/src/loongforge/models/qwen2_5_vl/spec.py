"""Registration of Qwen2.5-VL."""

from loongforge.core.plugins import Composition, Lazy

TOKEN_IDS = (
    ("image_token_id", "<|image_pad|>"),
    ("video_token_id", "<|video_pad|>"),
    ("vision_start_token_id", "<|vision_start|>"),
    ("vision_end_token_id", "<|vision_end|>"),
)
"""Where `config.json` says which tokens stand for images and videos."""

COMPOSITION = Composition(
    name="qwen2_5_vl",
    api=(1, 0),
    modality="vision-language",
    processor=Lazy("loongforge.models.vision.processor:qwen2_5_vl"),
    sizes=("qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen2_5_vl_32b", "qwen2_5_vl_72b"),
    configs="configs",
    components=Lazy("loongforge.models.qwen2_5_vl.hf:components"),
    to_hf=Lazy("loongforge.models.qwen2_5_vl.hf:to_hf"),
    prefixes=Lazy("loongforge.models.qwen2_5_vl.hf:prefixes"),
    modules=(("visual.", "model.visual."), ("model.", "model.language_model.")),
    hf_architectures=("Qwen2_5_VLForConditionalGeneration",),
    token_ids=TOKEN_IDS,
    extra="qwen",
    summary="Qwen2.5-VL, 3B to 72B: images and videos, window attention, sectioned positions.",
)
