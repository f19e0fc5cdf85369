"""NVIDIA GPUs. Nothing is substituted."""

from __future__ import annotations

import importlib.util

import torch

from loongforge.core.errors import PlatformError
from loongforge.core.platform.contract import Memory, Platform


class CudaPlatform(Platform):
    """One process per GPU, NCCL between them."""

    name = "cuda"
    device_type = "cuda"
    backend = "nccl"

    def device(self, local_rank: int) -> torch.device:
        """The GPU numbered as the worker on its node; made current."""
        if not torch.cuda.is_available():
            raise PlatformError(
                "platform 'cuda': a device node is here, but torch sees no GPU "
                f"(torch {torch.__version__}, CUDA {torch.version.cuda}). Check the driver, or set "
                "LOONGFORGE_PLATFORM=cpu."
            )
        if local_rank >= torch.cuda.device_count():
            raise PlatformError(
                f"platform 'cuda': worker {local_rank} has no GPU, this node has {torch.cuda.device_count()}. "
                "Start fewer workers with --nproc-per-node."
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
        """GPUs torch sees on this node."""
        return torch.cuda.device_count()

    def capabilities(self) -> frozenset[str]:
        """`te` when TransformerEngine is importable beside a GPU."""
        found = importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available()
        return frozenset({"te"} if found else ())
