"""Registration of the Kunlun platform."""

from loongforge.core.plugins import Lazy, PlatformSpec

PLATFORM = PlatformSpec(
    name="kunlun",
    api=(1, 0),
    device="cuda",  # the vendor's PyTorch answers the calls of torch.cuda
    probe=Lazy("loongforge.xpu.probe:kunlun"),
    platform=Lazy("loongforge.xpu.platform:KunlunPlatform"),
    summary="Kunlun XPUs through the vendor's PyTorch, collectives through its NCCL-compatible library",
)
