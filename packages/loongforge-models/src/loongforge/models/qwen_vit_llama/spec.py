"""Registration of the encoder of Qwen2.5-VL before LLaMA 3."""

from loongforge.core.plugins import Composition, Lazy

COMPOSITION = Composition(
    name="qwen_vit_llama",
    api=(1, 0),
    modality="vision-language",
    processor=Lazy("loongforge.models.vision.processor:qwen2_5_vl"),
    sizes=("qwen_vit_llama3_8b",),
    configs="configs",
    extra="qwen",
    summary="The vision encoder of Qwen2.5-VL before LLaMA 3, through a projector that starts fresh.",
)
