"""From the host to the device, without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`.

    CUDA's ordinary copy waits until the device has done all that it was told before; one from pinned memory does not.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
