"""Registration of `loongforge convert`."""

from loongforge.core.plugins import CommandSpec, Lazy

CONVERT = CommandSpec(
    name="convert",
    api=(1, 0),
    command=Lazy("loongforge.ckpt.convert.command:command"),
    summary="Convert a Hugging Face directory to a checkpoint of ours, or back.",
)
