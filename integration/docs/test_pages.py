"""What the pages say of the software is so: links, tables, verbs, and the two languages of the README."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from loongforge.core import plugins
from loongforge.core.cli.shell import VERBS
from loongforge.core.env import VARIABLES

from .blocks import Block, blocks_of

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "packages").glob("*/README.md"),
        *(ROOT / "packages").glob("*/src/**/*.md"),
    }
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def names(pages: list[Path]) -> list[str]:
    """Ids of pages."""
    return [page.relative_to(ROOT).as_posix() for page in pages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / unquote(path)).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link}: outside the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_no_path_of_a_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"(?<![\w.])/(?:home|work|root|tmp|Users|mnt|opt)/[\w./-]*", text)
    assert not found, found


def test_the_index_lists_every_page() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall((ROOT / "docs/index.md").read_text(encoding="utf-8"))}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= linked, f"not in docs/index.md: {sorted(pages - linked)}"


def shows(block: Block, root: Path) -> bool:
    """Whether a block marked `source: FILE` is that file, one marked `part of: FILE` lines of it."""
    text = (root / block.value).read_text(encoding="utf-8")
    return block.text.strip() == text.strip() if block.mark == "source" else block.text.strip("\n") in text


QUOTED = [block for page in PAGES for block in blocks_of(page, ROOT) if block.mark in ("source", "part of")]


@pytest.mark.parametrize("block", QUOTED, ids=lambda block: block.place)
def test_code_on_a_page_is_the_file_it_names(block: Block) -> None:
    assert (ROOT / block.value).is_file(), f"{block.place}: no file {block.value}"
    assert shows(block, ROOT), f"{block.place} differs from {block.value}: copy the file again"


def test_a_page_that_differs_from_its_file_fails(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("one = 1\ntwo = 2\n")
    page = tmp_path / "page.md"
    page.write_text(
        "".join(
            f"<!-- {mark}: code.py -->\n```python\n{text}\n```\n"
            for mark, text in (
                ("source", "one = 1\ntwo = 2"),
                ("source", "one = 1"),
                ("part of", "two = 2"),
                ("part of", "two = 3"),
            )
        )
    )
    assert [shows(block, tmp_path) for block in blocks_of(page, tmp_path)] == [True, False, True, False]


def table(page: Path, head: str) -> dict[str, str]:
    """Rows of the two-column table under the heading row that begins with `head`: first cell to second."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows: dict[str, str] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, text = line.strip("|").split("|", 1)
        rows[name.strip().strip("`")] = text.strip()
    return rows


def test_the_table_of_variables_is_that_of_the_code() -> None:
    assert table(ROOT / "docs/configuration.md", "Variable") == VARIABLES


@pytest.mark.parametrize(("page", "head"), [("README.md", "Verb"), ("README.zh.md", "命令")])
def test_every_verb_is_documented(page: str, head: str) -> None:
    known = {*VERBS, *(name.replace(".", " ") for name in plugins.registered("commands"))}  # `bench.mtp`: two words
    assert {name.removeprefix("loongforge ") for name in table(ROOT / page, head)} == known


def test_both_readmes_have_the_same_parts() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README.zh.md"
    levels = [re.findall(r"^(#+) ", prose(page), re.MULTILINE) for page in (english, chinese)]
    assert levels[0] == levels[1]
    blocks = [[(b.language, b.text, b.mark, b.value) for b in blocks_of(page, ROOT)] for page in (english, chinese)]
    assert blocks[0] == blocks[1]
    rows = [len(re.findall(r"^\|", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in (english, chinese)]
    assert rows[0] == rows[1]
    links = [LINK.findall(prose(page)) for page in (english, chinese)]
    assert sorted(links[0][1:]) == sorted(links[1][1:])  # the first leads to the other language


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 50


def test_the_tour_names_every_step_of_the_trainer() -> None:
    """What the functions of `run.py` import is what a run is made of."""
    source = (ROOT / "packages/loongforge-core/src/loongforge/core/run.py").read_text(encoding="utf-8")
    imported = {
        alias.name
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    named = set(re.findall(r"`(\w+)`", prose(ROOT / "docs/tour.md")))
    assert len(imported) > 10, imported
    assert imported <= named, f"not in docs/tour.md: {sorted(imported - named)}"
