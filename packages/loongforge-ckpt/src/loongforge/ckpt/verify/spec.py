"""Registration of `loongforge verify`."""

from loongforge.core.plugins import CommandSpec, Lazy

VERIFY = CommandSpec(
    name="verify",
    api=(1, 0),
    command=Lazy("loongforge.ckpt.verify.command:command"),
    extra="verify",
    summary="Compare logits, loss and every gradient of a Hugging Face directory with transformers.",
)
