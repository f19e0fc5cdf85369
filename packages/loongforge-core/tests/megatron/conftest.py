"""Brings megatron-core up on the CPU for the tests of this folder, which share `tiny_experts`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The module `tiny_experts`: it imports megatron-core, which must come after the platform."""
    import torch

    from loongforge.core.megatron.start import preload
    from loongforge.core.platform import choose

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # transformers' side runs here, and a fork must not wait for a pool of threads
    preload(choose("cpu").platform())
    import tiny_experts

    yield tiny_experts
    torch.set_num_threads(threads)
