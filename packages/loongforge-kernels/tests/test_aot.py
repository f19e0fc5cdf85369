"""Every configuration of the sparse attention kernels that released models use, compiled for Hopper without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs pip install triton")

T, S, K = 256, 8192, 2048
RED = (r"(atom|red)\S*\.v4\.f32",)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def check(call: Callable[..., Any], *arguments: Any, only: str = "", **asked: Any) -> list[str]:
    """Pass what `call` launches, or those of kernels named `only...`, through the gate. Names of the kernels."""
    import aot

    with aot.recorded() as launches:
        call(*arguments)
    chosen = [launch for launch in launches if launch.kernel.__name__.startswith(only)]
    for launch in chosen:
        aot.gate(aot.build(launch), **asked)
    return [launch.kernel.__name__ for launch in chosen]


@pytest.mark.parametrize(("width", "v_width"), [(192, 128), (256, 256)], ids=["V3.2", "GLM-5"])
def test_masked_mha(width: int, v_width: int):
    from loongforge.kernels.masked_mha import triton as kernels

    q, k, v = empty(T, 16, width), empty(S, 16, width), empty(S, 16, v_width)
    bits, ks = empty(T, S // 32, dtype=torch.int32), empty(T, dtype=torch.int32)
    out, lse = empty(T, 16, v_width), empty(T, 16, dtype=torch.float32)
    assert check(kernels.forward, q, k, v, bits, ks, ks, 0.1) == ["_forward"]
    names = check(kernels.backward, q, k, v, bits, ks, ks, 0.1, out, lse, out, lse)
    assert names == ["_backward_q", "_backward_kv"]


@pytest.mark.parametrize("heads", [16, 128])  # DeepSeek-V3.2, and what a rank has of it at tensor parallel size 8
def test_sparse_mla(heads: int):
    from loongforge.kernels.attention_target import triton as target
    from loongforge.kernels.sparse_mla import triton as kernels

    q, kv, indices = empty(T, heads, 576), empty(S, 576), empty(T, K, dtype=torch.int32)
    out, lse = empty(T, heads, 512), empty(T, heads, dtype=torch.float32)
    # all 255 registers are taken at 64 heads of 512 columns: one number of a turn (32 keys) waits in memory
    check(kernels.forward, q, kv, indices, 0.1, spills=0 if heads == 16 else 2)
    check(target.attention_target, q, kv, indices, lse, 0.1)
    backward = (kernels.backward, q, kv, indices, None, 0.1)
    assert check(*backward, False, out, lse, out, lse, only="_backward_scores")
    if heads == 128:  # the products of 64 are below; they have no cut of their own for 16, and need less there
        # every key's gradient leaves in vectors of four: a fourth of the additions to memory
        assert len(check(*backward, False, out, lse, out, lse, only="_backward_products", ptx=RED)) == 2
        assert len(check(*backward, True, out, lse, out, lse, only="_backward_products")) == 2
        assert check(*backward, True, out, lse, out, lse, only="_sum_pairs", wgmma=False)


def test_sparse_mla_of_64_heads():
    from loongforge.kernels.sparse_mla import triton as kernels

    q, kv, indices = empty(T, 64, 576), empty(S, 576), empty(T, K, dtype=torch.int32)
    out, lse = empty(T, 64, 512), empty(T, 64, dtype=torch.float32)  # GLM-5; the other kernels are those of 128
    check(kernels.backward, q, kv, indices, None, 0.1, False, out, lse, out, lse, only="_backward_products", ptx=RED)


def test_indexer_kl():
    from loongforge.kernels.indexer_kl import triton as kernels

    scores, row = empty(T, K, dtype=torch.float32), empty(T, dtype=torch.float32)
    check(kernels.forward, scores, scores, wgmma=False)
    check(kernels.backward, scores, scores, row, row, row, wgmma=False)
