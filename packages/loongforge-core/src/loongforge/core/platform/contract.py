"""The contract of a device platform."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes in use by this process on its device, now and at most since the start."""

    current: int
    peak: int


class Platform(ABC):
    """One kind of device. Instances hold no state besides what `activate` substitutes."""

    name: str
    device_type: str
    """torch device type."""
    backend: str
    """torch.distributed backend."""

    def activate(self) -> None:  # noqa: B027 - most platforms have nothing to do
        """Called once per process before the first import of megatron-core."""

    def after_import(self) -> None:  # noqa: B027
        """Called once per process after megatron-core is imported."""

    @abstractmethod
    def device(self, local_rank: int) -> torch.device:
        """The device of a worker; makes it the current one."""

    @abstractmethod
    def memory(self) -> Memory:
        """Memory of this process on its device."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for the device to finish what was queued."""

    @abstractmethod
    def device_count(self) -> int:
        """Devices on this node; 0 when workers share what there is (CPU)."""

    def capabilities(self) -> frozenset[str]:
        """What this platform can do beyond the plain path: `te` (TransformerEngine layers)."""
        return frozenset()

    @property
    def fork_safe(self) -> bool:
        """Whether workers may be forked from a process that has imported torch."""
        return False
