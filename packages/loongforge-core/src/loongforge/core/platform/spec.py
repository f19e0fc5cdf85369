"""Built-in platforms, as plain data."""

from loongforge.core.plugins import Lazy, PlatformSpec

CPU = PlatformSpec(
    name="cpu",
    api=(1, 0),
    device="cpu",
    probe=Lazy("loongforge.core.platform.probe:cpu"),
    platform=Lazy("loongforge.core.platform.cpu:CpuPlatform"),
    summary="Any CPU, collectives through gloo",
)
CUDA = PlatformSpec(
    name="cuda",
    api=(1, 0),
    device="cuda",
    probe=Lazy("loongforge.core.platform.probe:cuda"),
    platform=Lazy("loongforge.core.platform.cuda:CudaPlatform"),
    summary="NVIDIA GPUs, collectives through NCCL",
)
