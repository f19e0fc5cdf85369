"""The device of the tests in this folder: the CPU under Triton's interpreter, else the GPU, where kernels are compiled.

Products of fp32 are exact there too: `tl.dot` takes TF32 unless it is told otherwise, with an error of 3e-4, and is
told before a kernel is compiled. What is left is the order of sums and the hardware's exp2 and rsqrt (`device.fp32`).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from device import ON_GPU


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What tests make without saying where, they make there."""
    if ON_GPU:
        monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    with torch.device("cuda" if ON_GPU else "cpu"):
        yield
