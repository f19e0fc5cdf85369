"""What a device can do at most, by which a step is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DENSE_BF16: Mapping[str, float] = {
    "H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0, "A800": 312.0, "H800": 989.4, "L40S": 362.0,
    "L40": 181.0, "L20": 119.5, "H20": 148.0, "B200": 2250.0, "B300": 2250.0,
}  # fmt: skip
"""TFLOP/s of NVIDIA's datasheets, dense bf16 with fp32 sums; the first word that a device's name contains counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The rate that counts as all of it."""

    tflops: float
    origin: str
    """`given`, `datasheet` or `measured`."""
    product: float
    """TFLOP/s of a large matrix product in the same run."""


def peak_of(device: str, given: float | None, product: float, precision: str) -> Peak:
    """`--peak-tflops`, or the datasheet's figure of a known device in bf16, or what a large product reached."""
    if given is not None:
        return Peak(tflops=given, origin="given", product=product)
    names = sorted(DENSE_BF16, key=len, reverse=True)
    known = next((name for name in names if name in device), None) if precision == "bf16" else None
    if known is None:
        return Peak(tflops=product, origin="measured", product=product)
    return Peak(tflops=DENSE_BF16[known], origin="datasheet", product=product)
