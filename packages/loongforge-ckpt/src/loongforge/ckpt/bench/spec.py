"""Registration of `loongforge bench mtp` and `loongforge bench step`."""

from loongforge.core.plugins import CommandSpec, Lazy

MTP = CommandSpec(
    name="bench.mtp",
    api=(1, 0),
    command=Lazy("loongforge.ckpt.bench.command:command"),
    summary="Measure how often further prediction layers agree with the model itself, on text.",
)

STEP = CommandSpec(
    name="bench.step",
    api=(1, 0),
    command=Lazy("loongforge.ckpt.bench.step.command:command"),
    extra="verify",
    summary="Check a training step against transformers and megatron-core, then time it against theirs.",
)
