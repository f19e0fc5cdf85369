"""`LanguageModel` under features and three rows of position ids equals transformers' text towers, in every layout."""

from __future__ import annotations

import pytest
from tower_run import Case, Distance, distance, measure
from towers import Truth, truth

LIMIT = 2e-5
"""fp32, see `Distance`. Measured worst over the cases: loss 1.1e-7, logits 7.9e-7, gradients 3.4e-6, rows 1.4e-6."""

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PAIRS = {**FULL, "recompute_num_layers": 2}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("layernorm", "core_attn")}

CASES = {
    "qwen3_vl": Case(truth="qwen3_vl"),
    "qwen3_vl-packed": Case(truth="qwen3_vl-packed", packed=True),
    "qwen2_5_vl": Case(truth="qwen2_5_vl"),
    "llama3": Case(truth="llama3"),
    "full": Case(truth="qwen3_vl", parallel=FULL),
    "pairs": Case(truth="qwen3_vl", parallel=PAIRS),
    "block": Case(truth="qwen3_vl", parallel=BLOCK),
    "selective": Case(truth="qwen3_vl", parallel=SELECTIVE),
    "frozen": Case(truth="qwen3_vl", frozen_embedding=True),
    "frozen-full": Case(truth="qwen3_vl", parallel=FULL, frozen_embedding=True),
    "frozen-full-text": Case(truth="text", parallel=FULL, frozen_embedding=True),
    "one-by-one": Case(truth="qwen3_vl", one_by_one=True),
    "tp2": Case(truth="qwen3_vl", parallel=TP2),
    "tp2-no-sp": Case(truth="qwen2_5_vl", parallel={"tensor_model_parallel_size": 2}),
    "tp2-full": Case(truth="qwen3_vl", parallel={**TP2, **FULL}),
    "tp2-text": Case(truth="text", parallel=TP2),
    "cp2": Case(truth="qwen3_vl", parallel={"context_parallel_size": 2}),
    "cp2-packed": Case(truth="qwen3_vl-packed", packed=True, parallel={"context_parallel_size": 2}),
    "cp2-llama3": Case(truth="llama3", parallel={"context_parallel_size": 2}),
    "tp2-cp2": Case(truth="qwen3_vl", parallel={**TP2, "context_parallel_size": 2}),
    "pp2": Case(truth="two-levels", parallel=PP2, one_by_one=True),
    "pp2-full": Case(truth="two-levels", parallel={**PP2, **FULL}, one_by_one=True),
    "vpp2": Case(truth="one-level", parallel={**PP2, "virtual_pipeline_model_parallel_size": 2}, one_by_one=True),
}


def truths() -> dict[str, Truth]:
    return {
        "qwen3_vl": truth("qwen3_vl", (24, 24, 24), (5, 0, 9), 3),
        "qwen3_vl-packed": truth("qwen3_vl", (12, 8, 20), (5, 0, 9), 3),
        "qwen2_5_vl": truth("qwen2_5_vl", (24, 24), (4, 7)),
        "llama3": truth("llama3", (64, 64), (0, 0)),
        "text": truth("qwen3_vl", (24, 24), (0, 0), 3),
        "two-levels": truth("qwen3_vl", (24, 24, 24, 24), (5, 0, 9, 3), 2),
        "one-level": truth("qwen3_vl", (24, 24, 24, 24), (5, 0, 9, 3), 1),
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Distance | str]:
    return measure(truths, CASES)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, found: dict[str, Distance | str]) -> None:
    distance(found, case).within(LIMIT)


@pytest.mark.parametrize("case", ["full", "pairs", "block", "selective"])
def test_recomputing_changes_no_bit(case: str, found: dict[str, Distance | str]) -> None:
    assert distance(found, case).bits == distance(found, "qwen3_vl").bits
