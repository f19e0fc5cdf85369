"""Kunlun XPUs. The vendor's PyTorch answers the calls of torch.cuda, so nothing is substituted here.

The runtime is not public: this class was never run on the device. What it assumes is in the README of this package.
"""

from __future__ import annotations

from importlib import import_module

import torch

from loongforge.core.errors import PlatformError
from loongforge.core.platform.contract import Memory, Platform
from loongforge.xpu.probe import RUNTIME


def start_runtime() -> None:
    """Import the vendor's runtime, which takes over torch.cuda; `PlatformError` when it is absent or does not load."""
    try:
        import_module(RUNTIME)
    except (ImportError, OSError) as error:  # OSError: a shared library of the runtime is absent
        raise PlatformError(
            f"platform 'kunlun' needs the vendor's PyTorch: the module {RUNTIME} cannot be imported "
            f"({type(error).__name__}: {error}). Install the torch and {RUNTIME} wheels that come with the Kunlun "
            "runtime, or set LOONGFORGE_PLATFORM=cpu."
        ) from error


class KunlunPlatform(Platform):
    """One process per XPU."""

    name = "kunlun"
    device_type = "cuda"
    backend = "nccl"

    def activate(self) -> None:
        """Start the runtime before megatron-core asks torch.cuda anything."""
        start_runtime()

    def device(self, local_rank: int) -> torch.device:
        """The XPU numbered as the worker on its node; made current."""
        count = self.device_count()
        if local_rank >= count:
            raise PlatformError(
                f"platform 'kunlun': worker {local_rank} has no XPU, torch {torch.__version__} sees {count} on this "
                "node. Start fewer workers with --nproc-per-node, or check the driver."
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def memory(self) -> Memory:
        """Bytes of torch's allocator."""
        return Memory(current=torch.cuda.memory_allocated(), peak=torch.cuda.max_memory_allocated())

    def synchronize(self) -> None:
        """Wait for the current device."""
        torch.cuda.synchronize()

    def device_count(self) -> int:
        """XPUs that the vendor's PyTorch sees on this node."""
        start_runtime()
        return torch.cuda.device_count()
