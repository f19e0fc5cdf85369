"""Freed memory stays with the process: a repeated step costs few page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from loongforge.kernels.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    x = torch.ones(16 << 20)
    y = x * 2
    return (x + y).sum()
for _ in range(4):
    step()
before = faults()
for _ in range(8):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt belongs to glibc")
def test_steps_reuse_memory():
    def faults(mode: str) -> int:
        run = subprocess.run([sys.executable, "-c", SCRIPT, mode], check=True, capture_output=True, text=True)
        return int(run.stdout)

    plain = faults("plain")
    assert plain > 200_000  # 8 steps of three tensors of 64 MiB in pages of 4 KiB: 393216
    assert faults("keep") < plain / 2
