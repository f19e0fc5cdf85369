"""The reference's process, every case's checkpoint, and the numbers for the table in docs/families.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zoo-results", metavar="FILE", help="write what the zoo measured, for integration/zoo/table.py")


@pytest.fixture(scope="session")
def reference() -> Iterator[Any]:
    """The process that computes every reference."""
    from reference import Reference

    process = Reference()
    yield process
    process.close()


@pytest.fixture(scope="session")
def zoo(megatron: Any, reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Cases with everything that more than one test needs of them, made once."""
    from keeper import Keeper

    import loongforge.ckpt.hf.load
    import loongforge.ckpt.verify.measure  # noqa: F401 - for the workers, which are forked from here

    return Keeper(reference, tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """`results[case][what]`: what the tests measured; written to a file in the end."""
    measured: dict[str, Any] = {}
    yield measured
    file = request.config.getoption("--zoo-results", default=None)
    path = Path(file) if file else tmp_path_factory.getbasetemp() / "zoo.json"
    path.write_text(json.dumps(measured, indent=2, sort_keys=True) + "\n")
