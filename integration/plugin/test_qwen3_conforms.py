"""Our own families pass the kit that we ship for everybody's."""

from __future__ import annotations

from pathlib import Path

from loongforge.core.testing import check_family


def test_qwen3_conforms(tmp_path: Path) -> None:
    report = check_family("qwen3", directory=tmp_path)
    assert report.skipped == ()
    print(report)
