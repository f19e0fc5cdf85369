"""A process that has decoded a video can still fork workers that decode one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import TinyProcessor
from loongforge.core.testing import run_distributed
from loongforge.data.media import Medium, decode

video = Medium(kind="video", path=sys.argv[2])
grids = lambda: [item.grid for item in decode(video, TinyProcessor()).items]
before = grids()
assert run_distributed(lambda worker: grids(), 1, timeout=120) == [before] and before
"""


def test_a_forked_worker_decodes_too(pictures: Path) -> None:
    """With libswscale's own threads in the parent the child waits for them for ever."""
    words = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(pictures / "clip.mp4")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
