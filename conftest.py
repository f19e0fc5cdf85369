"""For every test of the workspace: what needs a GPU is skipped, with a line, where torch sees none."""

from __future__ import annotations

import os

import pytest

from loongforge.core.platform.probe import cuda

HERE, WHY = cuda()

if HERE:
    # `torch.cuda.is_available()` then asks the driver's library, as counting devices does anyway. Else it would start
    # CUDA, and this process forks the workers of tests. Without a driver torch's optimizers take it for a GPU.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    if not HERE:  # before torch is asked: where the CPU stands in for a GPU it answers as one
        pytest.skip(f"needs a GPU: {WHY}")
    import torch

    if torch.cuda.device_count() == 0:
        pytest.skip("needs a GPU, and torch sees none")
