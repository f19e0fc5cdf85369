"""Registration of `loongforge bench kernels`: the kernels' wheel works without this one and cannot do it itself."""

from loongforge.core.plugins import CommandSpec, Lazy

BENCH_KERNELS = CommandSpec(
    name="bench.kernels",
    api=(1, 0),
    command=Lazy("loongforge.kernels.bench.command:command"),
    summary="Check an op of loongforge-kernels, then time it against what one would use without it.",
)
