"""A process that has decoded a video can still fork workers that decode one, whoever decoded it and how."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import av
sys.path.insert(0, sys.argv[1])
from conftest import TinyProcessor
from loongforge.core.testing import run_distributed
from loongforge.data.media import Medium, decode

video = Medium(kind="video", path=sys.argv[2])
grids = lambda: [item.grid for item in decode(video, TinyProcessor()).items]
before = grids()
{decoded}
assert run_distributed(lambda worker: grids(), 1, timeout=120) == [before] and before
"""

OTHERS = """
with av.open(sys.argv[2]) as container:
    assert [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
"""
"""As transformers reads a video: it leaves libswscale's threads in PyAV's own converter of the process."""


@pytest.mark.parametrize("decoded", ["", OTHERS], ids=["by us", "by others too"])
def test_a_forked_worker_decodes_too(decoded: str, pictures: Path) -> None:
    """A child that used a converter with threads of its parent would wait for them for ever."""
    words = [
        sys.executable,
        "-c",
        SCRIPT.replace("{decoded}", decoded),
        str(Path(__file__).parent),
        str(pictures / "clip.mp4"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
