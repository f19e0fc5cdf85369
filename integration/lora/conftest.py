"""The zoo's tiny checkpoints, each with random adapters, and a process that has PEFT."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "zoo")]


@pytest.fixture(scope="session")
def peft() -> Iterator[Any]:
    """The process that computes every reference."""
    from lora_reference import LoraReference

    process = LoraReference()
    yield process
    process.close()


@pytest.fixture(scope="session")
def shelf(megatron: Any, peft: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints, adapters and what the reference makes of them, each made once."""
    from lora_run import Shelf

    return Shelf(peft, tmp_path_factory.mktemp("lora"))
