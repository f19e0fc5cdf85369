"""Run `loongforge train` as a user would, in a process of its own."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from loongforge.core.errors import PREEMPTED_EXIT_CODE, ForgeError

LAUNCH = "import sys; from loongforge.core.cli import main; sys.exit(main())"
"""What the `loongforge` script does, whether or not that script is on the PATH."""
SHOWN_LINES = 15
"""Last lines of stderr that a failure shows."""


class TrainingStopped(ForgeError):
    """`loongforge train` did not end well; `exit_code` is its own."""

    def __init__(self, text: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(text)


def spoken(arguments: Sequence[str]) -> str:
    """The command as a user types it, folded with backslashes: one flag a line where it gets long."""
    groups: list[str] = []
    for word in arguments:
        if word.startswith("--") or not groups:
            groups.append(word)
        else:
            groups[-1] += f" {shlex.quote(word)}"
    lines = ["loongforge train"]
    for group in groups:
        if len(lines[-1]) + len(group) > 100:
            lines.append(f"    {group}")
        else:
            lines[-1] += f" {group}"
    return " \\\n".join(lines)


def train(arguments: Sequence[str], log: Path, stdout: Any = None) -> None:
    """Run `loongforge train ARGUMENTS`; its progress goes to `stdout` (this process's own by default).

    Warnings and errors go to the file `log`. Ctrl-C and SIGTERM let it save first. Raises `TrainingStopped` with the
    end of the log when it fails, and with the remedy when it was interrupted.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as errors:
        command = [sys.executable, "-c", LAUNCH, "train", *arguments]
        with subprocess.Popen(command, stdout=stdout, stderr=errors) as child, _patient(child):
            code = child.wait()
    if code == PREEMPTED_EXIT_CODE:
        raise TrainingStopped("interrupted; what was trained is saved: run the same command again to go on.", code)
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:])
        raise TrainingStopped(
            f"loongforge train ended with exit code {code}. The end of {log}:\n{tail}", code if code > 0 else 128 - code
        )


@contextmanager
def _patient(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGTERM on to the child and leave Ctrl-C to it: the terminal sends that to both."""

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGTERM, forward)
        signal.signal(signal.SIGINT, lambda number, frame: None)
        yield
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)
