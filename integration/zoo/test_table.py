"""docs/families.md says what the cases prove: every family with its sizes, reference and layouts, and small numbers."""

from __future__ import annotations

import re

import pytest
from cases import CASES
from table import BEGIN, END, PAGE, facts, families


def lines() -> dict[str, list[str]]:
    """Cells of the table by family."""
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    return {row[0]: row for row in cells}


def test_no_family_is_missing_and_none_too_many() -> None:
    assert list(lines()) == [f"`{family}`" for family in families()]


@pytest.mark.parametrize("family", families())
def test_the_line_of_a_family(family: str) -> None:
    name, sizes, reference, *numbers, layouts = lines()[f"`{family}`"]
    assert (name, sizes, reference, layouts) == facts(family, families()[family])
    assert all(0 < float(number) < 2e-5 for number in numbers), numbers


def test_what_is_easily_wrong_names_tests_that_exist() -> None:
    section = PAGE.read_text().partition("## Where models are easily wrong")[2]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    shown = [name for row in rows for name in re.findall(r"`([^`]+)`", row[2])]
    assert len(rows) > 10
    assert len(shown) >= len(rows)
    for name in shown:
        file, _, function = name.partition("::")
        if function:
            assert f"def {function}(" in (PAGE.parents[1] / file).read_text(), name
        else:
            assert name in CASES, name


def test_every_language_model_has_a_case() -> None:
    from loongforge.core import plugins

    roles = {name: plugins.load("models", name).role for name in plugins.registered("models")}
    assert {name for name, role in roles.items() if role == "foundation"} == families().keys()
