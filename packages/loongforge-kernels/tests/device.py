"""Where the tests in `interpreted/` run, and how exact fp32 is there."""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = not INTERPRETED and torch.cuda.device_count() > 0

FP32_ON_GPU = 4.0
"""How many times the error on a CPU an fp32 result may have on a GPU, whose exp2 and rsqrt are approximations of two
units in the last place. Not measured yet."""


def fp32(ratio: float) -> float:
    """An error ratio measured on a CPU, as it is allowed here."""
    return ratio * (FP32_ON_GPU if ON_GPU else 1.0)
