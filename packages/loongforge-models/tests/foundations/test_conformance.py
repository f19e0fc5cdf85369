"""Every family through the whole check: built, loaded, saved, split, resumed, and equal to transformers."""

from __future__ import annotations

from typing import Any

import pytest
from released import FAMILIES

from loongforge.core.testing.conformance import check_family

YARN: dict[str, Any] = {"rotary_scaling_factor": 4.0, "original_max_position_embeddings": 16}
"""So that the stretch reaches the tiny frequencies."""
DIRECT: dict[str, Any] = {
    "q_lora_rank": None,
    "first_dense_layers": 0,
    "rotary_scaling_factor": 1.0,
    "original_max_position_embeddings": 4096,  # no effect and no place in `config.json` without YaRN
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tiny"),
    [
        ("qwen", {}),
        ("internlm2", {}),
        ("qwen2", {}),
        ("llama", {"original_max_position_embeddings": 16}),
        ("qwen3_moe", {}),
        ("qwen3_next", {}),
        ("glm4_moe", {}),
        ("deepseek2", YARN),
        ("minimax_m2", {}),
        ("deepseek3", YARN),
        ("deepseek3", DIRECT),
    ],
)
def test_family_conforms(family: str, tiny: dict[str, Any]) -> None:
    report = check_family(family, tiny=tiny)
    # integration/zoo has a reference of its own for families without a class of transformers.
    assert [one.check for one in report.skipped] == ([] if FAMILIES[family].transformers else ["transformers"])


@pytest.mark.slow
def test_mimo_conforms_with_further_layers() -> None:
    """transformers has no class of it; integration/zoo has the reference."""
    report = check_family("mimo", tiny={"mtp_num_layers": 2})
    assert [one.check for one in report.skipped] == ["transformers"]
