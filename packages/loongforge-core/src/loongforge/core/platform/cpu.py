"""Any CPU: megatron-core's CUDA calls are answered by their CPU meaning, collectives go through gloo."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from torch.utils._device import _device_constructors

from loongforge.core.platform import cpu_import, cpu_norm, cpu_random, cpu_runtime
from loongforge.core.platform.contract import Memory, Platform
from loongforge.core.platform.substitution import install
from loongforge.kernels.host_memory import keep_freed_memory


class CpuPlatform(Platform):
    """Workers share the machine's cores and memory."""

    name = "cpu"
    device_type = "cpu"
    backend = "gloo"

    def activate(self) -> None:
        """Answer the CUDA runtime, then import megatron-core without its compiler."""
        # `with torch.device("meta")` knows factories by identity, from a list made at first use: make it before they
        # are wrapped, else the context is ignored and, for one, transformers loads models with unset weights.
        _device_constructors()
        # glibc returns large blocks to the system at every free, and a training step frees and takes back all of its
        # activations: without this a step spends more time in page faults than in small ops.
        keep_freed_memory()
        for group in cpu_runtime.GROUPS.values():
            install(group)
        cpu_import.import_without_compiler()

    def after_import(self) -> None:
        """Give megatron-core's random state tracker the CPU generator and its clipping an exact norm.

        Its advice about CUDA launch queues is dropped.
        """
        install(cpu_random.substitutions())
        install(cpu_norm.substitutions())
        from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce as linear

        linear.warned = True  # upstream's own mark; else it recommends CUDA_DEVICE_MAX_CONNECTIONS, which a CPU has not

    def device(self, local_rank: int) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def memory(self) -> Memory:
        """Resident set of this process."""
        current = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Memory(current=current, peak=max(peak, current))  # the kernel counts the peak in coarser steps

    def synchronize(self) -> None:
        """CPU work is already in order."""

    def device_count(self) -> int:
        """0: any number of workers shares the CPU."""
        return 0

    @property
    def fork_safe(self) -> bool:
        """Nothing is initialised that a fork would break."""
        return True
