"""Lets the tests of this folder, and the script that measures a real model, share `plan_tiny`; a composition for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
SPEC = """
from loongforge.core.plugins import API, Composition, Lazy

TINY = Composition(name="tiny_vl", api=API, modality="vision-language", processor=Lazy("absent:none"))
"""


@pytest.fixture
def composition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the composition that `plan_tiny.sighted` names."""
    info = tmp_path / "tiny_pictures-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-pictures\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[loongforge.compositions]\ntiny_vl = tiny_pictures:TINY\n")
    (tmp_path / "tiny_pictures.py").write_text(SPEC)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("tiny_pictures", None)
