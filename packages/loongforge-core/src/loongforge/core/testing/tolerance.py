"""How exact fp32 is on each platform, in one place: tests state what they measured on a CPU.

TF32 is off everywhere: torch multiplies fp32 matrices exactly unless asked otherwise, and `exact` turns it off for
convolutions too, where it is torch's default.
"""

from __future__ import annotations

from collections.abc import Mapping

from loongforge.core.platform.choose import choose

FACTORS: Mapping[str, float] = {"cpu": 1.0, "cuda": 5.0}
"""How many times the CPU's tolerance a platform may need: other orders of sums, and approximations of exp and rsqrt.
`cuda` is not measured yet; mistakes are a thousand times further off. Platforms that are not listed are as `cuda`."""


def fp32_tolerance(measured: float) -> float:
    """A tolerance of fp32 results that holds on a CPU, as it is on the platform of LOONGFORGE_PLATFORM."""
    return measured * FACTORS.get(choose().name, FACTORS["cuda"])


def exact() -> None:
    """No TF32 in this process and those forked from it."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # pyright: ignore[reportAttributeAccessIssue]  made when asked
