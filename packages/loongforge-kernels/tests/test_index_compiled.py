"""The indexer's kernels and fp8's compiled for Hopper as DeepSeek-V3.2 (64 index heads) and GLM-5 (32) launch them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("needs pip install triton", allow_module_level=True)

import aot

from loongforge.kernels.fp8 import triton as fp8
from loongforge.kernels.gather_scores import triton as gather
from loongforge.kernels.indexer_logits import triton as logits
from loongforge.kernels.select_topk import triton as topk
from loongforge.kernels.selection_bits import triton as bits

QUERIES, KEYS, WIDTH, TOPK = 4096, 65536, 128, 2048


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def bounds() -> tuple[torch.Tensor, torch.Tensor]:
    return meta(QUERIES, dtype=torch.int32), meta(QUERIES, dtype=torch.int32)


def indexer(heads: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """q, k and w."""
    q, k = meta(QUERIES, heads, WIDTH, dtype=dtype), meta(KEYS, WIDTH, dtype=dtype)
    return q, k, meta(QUERIES, heads, dtype=torch.float32)


def built(launch: Callable[[], Any], tmp_path, monkeypatch) -> aot.Built:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with aot.recorded() as launches:
        launch()
    (one,) = launches
    return aot.build(one)


@pytest.mark.parametrize("heads", [64, 32])
def test_logits(heads, tmp_path, monkeypatch):
    found = built(lambda: logits.indexer_logits(*indexer(heads), *bounds(), True, None), tmp_path, monkeypatch)
    aot.gate(found, ptx=(r"cp\.async",))  # keys are on their way while the last ones are multiplied


@pytest.mark.parametrize("heads", [64, 32])
def test_logits_of_fp8(heads, tmp_path, monkeypatch):
    narrow, scale = indexer(heads, torch.float8_e4m3fn), meta(KEYS, dtype=torch.float32)
    found = built(lambda: logits.indexer_logits(*narrow, *bounds(), True, scale), tmp_path, monkeypatch)
    aot.gate(found, wgmma=False)
    assert found.count("QGMMA[.0-9A-Zx]*"), "no fp8 warpgroup matrix product"


def test_topk(tmp_path, monkeypatch):
    scores = meta(QUERIES, KEYS, dtype=torch.float32)
    found = built(lambda: topk.select_topk(scores, *bounds(), TOPK), tmp_path, monkeypatch)
    aot.gate(found, wgmma=False, ptx=(r"ld\.global\.v4",))


def test_gathered_scores(tmp_path, monkeypatch):
    indices = meta(QUERIES, TOPK, dtype=torch.int32)
    found = built(lambda: gather.gather_scores(*indexer(64), indices, True, False), tmp_path, monkeypatch)
    aot.gate(found, ptx=(r"cp\.async",))


@pytest.mark.parametrize(
    ("heads", "deterministic", "addition"), [(64, False, r"v4\.f32"), (64, True, r"add\.u64"), (32, False, r"v4\.f32")]
)
def test_gradients_of_gathered_scores(heads, deterministic, addition, tmp_path, monkeypatch):
    grad, indices = meta(QUERIES, TOPK, dtype=torch.float32), meta(QUERIES, TOPK, dtype=torch.int32)
    found = built(
        lambda: gather.gather_scores_backward(grad, *indexer(heads), indices, True, deterministic),
        tmp_path,
        monkeypatch,
    )
    aot.gate(found, ptx=(addition,))


def test_bits(tmp_path, monkeypatch):
    indices = meta(QUERIES, TOPK, dtype=torch.int32)
    aot.gate(built(lambda: bits.selection_bits(indices, KEYS), tmp_path, monkeypatch), wgmma=False)


@pytest.mark.parametrize("columns", [128, 7168])
def test_quantisation(columns, tmp_path, monkeypatch):
    x = meta(QUERIES, columns)
    if columns == 128:
        aot.gate(built(lambda: fp8.hadamard_quant(x, True, 1e-12, True), tmp_path, monkeypatch))
    else:
        found = built(lambda: fp8.quantize(x, 1, 128, 1e-12, True, True), tmp_path, monkeypatch)
        aot.gate(found, wgmma=False, ptx=(r"ld\.global\.v4", r"st\.global\.v[24]"))


@pytest.mark.parametrize("rows", [1, QUERIES], ids=["rows", "a matrix"])
def test_quantisation_of_known_blocks(rows, tmp_path, monkeypatch):
    found = built(lambda: fp8.quantize(meta(QUERIES, 2048), rows, 2048, 1e-12, False, False), tmp_path, monkeypatch)
    aot.gate(found, wgmma=False, ptx=(r"ld\.global\.v4", r"st\.global\.v[24]"))
