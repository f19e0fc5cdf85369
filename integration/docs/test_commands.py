"""The commands of the documentation are typed, page by page, where a reader would type them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .blocks import Block, answers, blocks_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LIMIT_SECONDS = 400
"""For one block; each takes seconds on a free machine, and machines are not always free."""


def environment(home: Path) -> dict[str, str]:
    """What a reader has after activating the environment, on a machine without accelerators."""
    kept = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    return {**kept, "PATH": path, "HOME": str(home), "LOONGFORGE_PLATFORM": "cpu", "HF_HUB_OFFLINE": "1"}


def run(block: Block, folder: Path, home: Path) -> None:
    """Type one block; fails with its place, its output and what it should have said."""
    shell = ["bash", "-euo", "pipefail", "-c", block.script]
    done = subprocess.run(
        shell,
        cwd=folder,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    expected = int(block.value) if block.mark == "exit" else 0
    told = f"{block.place}\n{block.script}\n--- exit code {done.returncode}, printed:\n{done.stdout}"
    assert done.returncode == expected, told
    lacking = answers(block, done.stdout)
    assert not lacking, f"{told}\n--- the page also shows: {lacking}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page: Path, prepared: Path, tmp_path: Path) -> None:
    folder, home = tmp_path / "work", tmp_path / "home"
    shutil.copytree(prepared, folder)
    home.mkdir()
    for block in blocks_of(page, ROOT):
        if block.mark == "file":
            (folder / block.value).write_text(block.text + "\n", encoding="utf-8")
        elif block.runs:
            run(block, folder, home)


UNRUN = [block for page in PAGES for block in blocks_of(page, ROOT) if block.is_command and not block.runs]


@pytest.mark.parametrize("block", UNRUN, ids=lambda block: block.place)
def test_what_is_not_run_says_why(block: Block) -> None:
    pytest.skip(f"{block.place}: not run: {block.value}")


def test_the_commands_that_the_readme_leaves_to_ci_are_there() -> None:
    """They are not run here because `.ci/run` runs them; so it has to."""
    text, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    assert "\npip install uv && uv run loongforge quickstart\npip install uv && uv run pytest\n" in text
    assert "\nuv run loongforge quickstart --vlm\n" in text
    quickstart = r"^uv run loongforge quickstart"
    for step in (r"pip install.* uv$", rf"{quickstart} --output", rf"{quickstart} --vlm", r"^uv run pytest$"):
        assert re.search(step, ci, re.MULTILINE), step


def page_with(tmp_path: Path, text: str) -> list[Block]:
    page = tmp_path / "page.md"
    page.write_text(text)
    return blocks_of(page, tmp_path)


def test_a_wrong_page_fails(tmp_path: Path) -> None:
    command, answer, mark = page_with(
        tmp_path,
        "```bash\nloongforge no-such-verb\n```\n\n```console\n$ echo one\ntwo\n```\n\n"
        "<!-- exit: 3 -->\n```console\n$ echo a ... z; exit 3\na ... z\n```\n",
    )
    with pytest.raises(AssertionError, match="no-such-verb"):
        run(command, tmp_path, tmp_path)
    with pytest.raises(AssertionError, match=r"the page also shows: \['two'\]"):
        run(answer, tmp_path, tmp_path)
    run(mark, tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"page\.md:3: 'not run' needs a reason"):
        page_with(tmp_path, "<!-- not run: -->\n\n```bash\nls\n```\n")
    with pytest.raises(ValueError, match="never closed"):
        page_with(tmp_path, "```bash\nls\n")
