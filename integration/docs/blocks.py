"""The fenced blocks of a Markdown page, and what the comment above each says about running it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_MARK = re.compile(r"<!--\s*(?P<kind>not run|exit|file|source|part of):\s*(?P<value>.*?)\s*-->")
_FENCE = re.compile(r"```(?P<language>\w*)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    """Line of the page at which the fence opens, from 1."""
    language: str
    text: str
    mark: str = ""
    """`not run`, `exit`, `file`, `source` or `part of`, when such a comment stands directly above."""
    value: str = ""
    """What the comment says: the reason, the exit code, the file to write, the file it is or is a part of."""

    @property
    def place(self) -> str:
        """`docs/tour.md:12`."""
        return f"{self.page}:{self.line}"

    @property
    def is_command(self) -> bool:
        """Whether this is something to type."""
        return self.language in ("bash", "console", "sh", "shell")

    @property
    def runs(self) -> bool:
        """Whether the tests type it."""
        return self.is_command and self.mark != "not run"

    @property
    def script(self) -> str:
        """The commands: the whole block, or what follows `$ ` and its `> ` continuations in a console."""
        if self.language != "console":
            return self.text
        return "\n".join(line[2:] for line in self.text.splitlines() if line.startswith(("$ ", "> ")))

    @property
    def output(self) -> list[str]:
        """What a console block shows as the answer."""
        if self.language != "console":
            return []
        return [line for line in self.text.splitlines() if line.strip() and not line.startswith(("$ ", "> "))]


def blocks_of(page: Path, root: Path) -> list[Block]:
    """Every fenced block of a page, in order; `ValueError` for a fence that never closes or a mark without a reason."""
    found: list[Block] = []
    lines, name = page.read_text(encoding="utf-8").splitlines(), page.relative_to(root).as_posix()
    number, above = 0, ""
    while number < len(lines):
        fence = _FENCE.fullmatch(lines[number])
        if fence is None:
            above = lines[number].strip() or above  # an empty line may stand between the comment and the fence
            number += 1
            continue
        start = number
        number += 1
        while number < len(lines) and lines[number].strip() != "```":
            number += 1
        if number == len(lines):
            raise ValueError(f"{name}:{start + 1}: the fence is never closed.")
        mark = _MARK.fullmatch(above)
        if mark and not mark["value"]:
            raise ValueError(f"{name}:{start + 1}: '{mark['kind']}' needs a reason or a value.")
        found.append(
            Block(
                page=name,
                line=start + 1,
                language=fence["language"],
                text="\n".join(lines[start + 1 : number]),
                mark=mark["kind"] if mark else "",
                value=mark["value"] if mark else "",
            )
        )
        above = ""
        number += 1
    return found


def answers(block: Block, output: str) -> list[str]:
    """Lines that a console block shows and the command did not print; `...` stands for anything within a line."""
    printed = [" ".join(line.split()) for line in output.splitlines()]
    lacking: list[str] = []
    for line in block.output:
        pattern = ".*".join(re.escape(" ".join(part.split())) for part in line.split("..."))
        if not any(re.search(pattern, one) for one in printed):
            lacking.append(line)
    return lacking
