"""What needs more devices than there are is skipped before a process starts."""

from __future__ import annotations

import unittest
from types import SimpleNamespace

import pytest

from loongforge.core.testing import distributed, tolerance
from loongforge.core.testing.distributed import run_distributed


def test_two_processes_need_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(device_count=lambda: 1)
    found = SimpleNamespace(name="cuda", spec=SimpleNamespace(device="cuda"), platform=lambda: platform)
    monkeypatch.setattr(distributed, "choose", lambda: found)
    with pytest.raises(unittest.SkipTest, match="needs 2 devices of platform cuda, 1 here"):
        run_distributed(lambda worker: worker.rank, 2)
    assert run_distributed(lambda worker: worker.rank, 1) == [0]


def test_a_tolerance_is_that_of_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOONGFORGE_PLATFORM", "cpu")
    assert tolerance.fp32_tolerance(2e-5) == 2e-5
    monkeypatch.setattr(tolerance, "choose", lambda: SimpleNamespace(name="cuda"))
    assert tolerance.fp32_tolerance(2e-5) == pytest.approx(1e-4)
