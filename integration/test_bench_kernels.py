"""What the benchmark of kernels compares with is the same computation: megatron-core's own, as a user would call it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loongforge.core.cli import main

SMALL = ["--device", "cpu", "--length", "64", "--heads", "2", "--topk", "16", "--repeat", "1"]


def test_megatron_core_computes_what_ours_does(megatron: Any, capsys: pytest.CaptureFixture[str]) -> None:
    peers = ["megatron-core, unfused", "megatron-core, tilelang"]
    assert main(["bench", "kernels", *SMALL, "--json", "--peers", *peers]) == 0
    rows = {row["rival"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    unfused, tilelang = (rows[peer] for peer in peers)
    assert unfused["timing"]["milliseconds"] > 0
    assert float(unfused["note"].removeprefix("off by ")) < 1e-5  # 6e-7 measured, in fp32 against fp64
    assert tilelang["timing"] is None
    assert "declined" in tilelang["note"] or "tilelang" in tilelang["note"]
