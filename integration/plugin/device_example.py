"""A platform for a device whose PyTorch lacks one call that megatron-core makes. Shown in docs/add-a-device.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from loongforge.core.platform.cpu import CpuPlatform
from loongforge.core.platform.substitution import Substitution, install


class AcmePlatform(CpuPlatform):
    """Answers as the CPU does, so that the tests of this page run anywhere, and one call by itself."""

    name = "acme"

    def activate(self) -> None:
        """Replace what differs before megatron-core is imported."""
        super().activate()
        install(SUBSTITUTIONS)


def _no_meter(original: Callable[..., int]) -> Callable[..., int]:
    def power_draw(device: Any = None) -> int:
        return 0

    return power_draw


SUBSTITUTIONS = (
    Substitution(
        owner=torch.cuda,
        name="power_draw",
        make=_no_meter,
        why="it asks NVIDIA's management library, which knows nothing of this device",
        upstream="megatron/core/utils.py StragglerDetector",
        remove_when="the detector can be told how to measure, or the vendor's PyTorch answers",
    ),
)
