"""The code on the pages for plugin authors is the code of the files that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loongforge.core.testing import run_distributed

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"<!-- (?P<kind>source|part of): (?P<file>\S+) -->\n```\w+\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
PAGES = ("docs/add-a-model.md", "docs/add-a-device.md", "docs/add-an-encoder.md")


def stale(page: str) -> list[str]:
    """Files that a page shows otherwise than they are."""
    found: list[str] = []
    for block in BLOCK.finditer(page):
        content = (ROOT / block["file"]).read_text()
        true = block["text"] == content if block["kind"] == "source" else block["text"] in content
        found += [] if true else [block["file"]]
    return found


@pytest.mark.parametrize("name", PAGES)
def test_code_is_that_of_the_files(name: str) -> None:
    page = (ROOT / name).read_text()
    assert stale(page) == []
    marks = len(re.findall(r"<!-- (?:source|part of):", page))
    assert len(BLOCK.findall(page)) == marks >= 4, "every mark stands directly above its block"


def test_a_changed_file_is_found() -> None:
    page = (ROOT / PAGES[0]).read_text()
    assert stale(page.replace("hidden_size: 64", "hidden_size: 65")) == [
        "integration/plugin/acme/src/acme_llama/configs/acme_llama_tiny.yaml"
    ]


@pytest.mark.parametrize(("page", "folder"), [(PAGES[0], "acme"), (PAGES[2], "acme_vision")])
def test_every_file_of_the_distribution_is_shown(page: str, folder: str) -> None:
    shown = {file for _, file, _ in BLOCK.findall((ROOT / page).read_text())}
    code = {path for path in (ROOT / "integration/plugin" / folder).rglob("*.py") if path.name != "__init__.py"}
    assert {path.relative_to(ROOT).as_posix() for path in code} <= shown


def test_the_family_is_as_short_as_its_page_says() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / "integration/plugin/acme").rglob("*.py"))
    assert lines <= 150, "the page promises a family in 150 lines"


def test_the_substitution_of_the_page_takes_effect_once() -> None:
    def work(_: object) -> tuple[int, bool]:
        import importlib.util

        import torch

        from loongforge.core.megatron.start import start_megatron

        spec = importlib.util.spec_from_file_location("device_example", Path(__file__).with_name("device_example.py"))
        assert spec is not None
        assert spec.loader is not None
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        platform = example.AcmePlatform()
        start_megatron(platform)
        first = torch.cuda.power_draw
        start_megatron(platform)
        return torch.cuda.power_draw(), torch.cuda.power_draw is first

    assert run_distributed(work, 1) == [(0, True)]
