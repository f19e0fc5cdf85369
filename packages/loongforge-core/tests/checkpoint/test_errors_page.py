"""docs/errors.md and errors.py say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loongforge.core import errors
from loongforge.core.errors import PREEMPTED_EXIT_CODE, ForgeError

PAGE = Path(__file__).parents[4] / "docs" / "errors.md"

CLASSES = [ForgeError, *ForgeError.__subclasses__()]
OURS = [kind for kind in CLASSES if kind.__module__ == errors.__name__]


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


def test_the_table_has_every_class_with_its_code_and_no_other(page: str) -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)
    assert {name: int(code) for code, name in rows} == {kind.__name__: kind.exit_code for kind in OURS}
    assert len({kind.exit_code for kind in OURS}) == len(OURS)


@pytest.mark.parametrize("kind", OURS[1:], ids=lambda kind: kind.__name__)
def test_every_class_has_a_section_with_a_typical_text_and_a_remedy(kind: type[ForgeError], page: str) -> None:
    _, found, rest = page.partition(f"\n## {kind.__name__} ({kind.exit_code})\n")
    assert found
    section = rest.partition("\n## ")[0]
    assert "\n> error: " in section
    assert any(line and not line.startswith(">") for line in section.splitlines())


def test_the_code_of_a_preemption_is_listed(page: str) -> None:
    assert f"\n| {PREEMPTED_EXIT_CODE} | | Asked to stop" in page
