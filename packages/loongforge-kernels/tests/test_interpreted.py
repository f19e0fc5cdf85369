"""Runs each file of `interpreted/` with Triton's interpreter; `conftest.py` says why in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs pip install triton")

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


PEERS = {
    "test_fla": ("fla", "fla-core"),
    "test_liger": ("liger_kernel", "liger-kernel"),
    "test_te": ("transformer_engine", "transformer-engine"),
}
"""What each file about another project imports, and its distribution."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_"))
def test_interpreted(file):
    if (peer := PEERS.get(file.stem)) is not None and find_spec(peer[0]) is None:
        pytest.skip(f"needs pip install {peer[1]}")
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "--durations=5", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
