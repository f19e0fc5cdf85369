"""Registration of PEFT's format and of `loongforge merge-adapter`."""

from loongforge.core.plugins import CommandSpec, FormatSpec, Lazy

FORMAT = FormatSpec(
    name="peft",
    api=(1, 0),
    detect=Lazy("loongforge.ckpt.peft.config:detect"),
    read_config=Lazy("loongforge.ckpt.peft.config:read_config"),
    load=Lazy("loongforge.ckpt.peft.move:load"),
    save=Lazy("loongforge.ckpt.peft.move:save"),
    holds="adapter",
    summary="PEFT directory: low-rank adapters of a model.",
)

MERGE = CommandSpec(
    name="merge-adapter",
    api=(1, 0),
    command=Lazy("loongforge.ckpt.peft.command:command"),
    summary="Add a PEFT adapter to a Hugging Face directory, or take it out again.",
)
