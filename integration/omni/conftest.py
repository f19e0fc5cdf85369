"""Lets the tests of this folder share `omni_run` and `tiny_vlm`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import omni_run
import tiny_vlm


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints of every vision-language family, written by transformers, by name."""
    root = tmp_path_factory.mktemp("vlm")
    return {name: make(root / name) for name, make in tiny_vlm.MAKERS.items()}


@pytest.fixture(scope="session")
def one_process(megatron: Any, vlm: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> omni_run.OneProcess:
    """What one process computes of these checkpoints."""
    return omni_run.OneProcess(vlm, tmp_path_factory.mktemp("one-process"))
