"""Registration of `loongforge bench mtp`."""

from loongforge.core.plugins import CommandSpec, Lazy

MTP = CommandSpec(
    name="bench.mtp",
    api=(1, 0),
    command=Lazy("loongforge.ckpt.bench.command:command"),
    summary="Measure how often further prediction layers agree with the model itself, on text.",
)
