"""Registration of the Hugging Face checkpoint format."""

from loongforge.core.plugins import FormatSpec, Lazy

FORMAT = FormatSpec(
    name="hf",
    api=(1, 0),
    detect=Lazy("loongforge.ckpt.hf.directory:detect"),
    read_config=Lazy("loongforge.ckpt.hf.directory:read_config"),
    load=Lazy("loongforge.ckpt.hf.load:load"),
    save=Lazy("loongforge.ckpt.hf.save:save"),
    summary="Hugging Face directory: safetensors, config.json, tokenizer.",
)
