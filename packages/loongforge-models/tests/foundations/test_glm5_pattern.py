"""Which layers of GLM-5 have an indexer, however a `config.json` says it."""

from __future__ import annotations

from typing import Any

import pytest
from released.glm5 import RELEASED

from loongforge.models.glm5.config import Glm5Config

LAYERS = 78
REGULAR = "FFF" + "SSSF" * 18 + "SSS"


@pytest.mark.parametrize(
    ("said", "pattern"),
    [
        ({}, REGULAR),
        ({"indexer_types": None}, REGULAR),
        ({"indexer_types": ["full"] * LAYERS}, "F" * LAYERS),
        ({"indexer_types": None, "index_topk_pattern": "FS" * 39}, "FS" * 39),
        ({"indexer_types": None, "index_topk_freq": None, "index_skip_topk_offset": 1}, "F" * LAYERS),
    ],
    ids=["released", "by frequency", "each named full", "by letters", "without a frequency"],
)
def test_the_pattern_comes_and_goes_as_it_was_said(said: dict[str, Any], pattern: str) -> None:
    config = Glm5Config.from_hf({**RELEASED["glm_5_2"], **said})
    assert config.indexer_pattern == pattern
    assert Glm5Config.from_hf(config.to_hf()).indexer_pattern == pattern
