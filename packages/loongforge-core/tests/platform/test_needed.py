"""megatron-core still needs every group of substitutions: without it a tiny train step fails inside megatron-core."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("needed.py")
CASES = {
    "placement": "tensor_parallel/layers.py",
    "factories": "optimizer/optimizer.py",
    "tensor": "models/common/language_module/language_module.py",
    "type": "optimizer/clip_grads.py",
    "streams": "distributed/param_and_grad_buffer.py",
    "backend": "",  # NCCL ends the process where there is no device
    "random": "tensor_parallel/random.py",
    "mcore random": "tensor_parallel/random.py",
    "mcore dispatch": "tensor_parallel/mappings.py",
    "repairs": "tensor_parallel/random.py",
}
"""Group -> where upstream fails without it."""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, str] | None]:
    """What happened in every case, from a process that nothing else has touched."""
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == "", "starting megatron-core and training write nothing on the terminal"
    return json.loads(done.stdout)


def test_every_group_has_a_case(outcomes: dict[str, dict[str, str] | None]) -> None:
    assert outcomes.keys() == {"nothing", *CASES}


def test_with_all_of_them_it_trains(outcomes: dict[str, dict[str, str] | None]) -> None:
    assert outcomes["nothing"] is None


@pytest.mark.parametrize("group", CASES)
def test_without_it_megatron_core_fails(group: str, outcomes: dict[str, dict[str, str] | None]) -> None:
    found = outcomes[group]
    assert found is not None, f"megatron-core trains without {group!r}: remove these substitutions"
    assert found["place"] == CASES[group], found
