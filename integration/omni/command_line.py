"""The command line as a user starts it, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = str(Path(sys.executable).parent / "loongforge")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""One thread per worker: the machine's processors are shared by all of them."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def loongforge(*words: object, folder: Path, timeout: float = 180) -> Ended:
    """Run the command in `folder` to its end."""
    done = subprocess.run(
        [COMMAND, *map(str, words)], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip
    return Ended(code=done.returncode, out=done.stdout, err=done.stderr)


def trained(*words: object, folder: Path, timeout: float = 180) -> Ended:
    """`loongforge train`, which must succeed."""
    ended = loongforge("train", *words, folder=folder, timeout=timeout)
    assert ended.code == 0, f"{ended.out[-3000:]}\n{ended.err[-3000:]}"
    return ended


def metrics(run: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """Loss of every step, all digits."""
    return [row["loss"] for row in metrics(run)]


def kill_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a command and every worker it started; it was started in a session of its own."""
    os.killpg(process.pid, number)
    process.wait()
