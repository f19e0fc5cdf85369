"""Every configuration of the kernels that released models use, compiled for Hopper without a GPU."""

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
READ, WRITE = r"ld\.global\S*\.v4\.b32", r"st\.global\S*\.v4\.b32"
"""Sixteen bytes of each thread at once."""


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


def test_cross_entropy():
    import aot

    from loongforge.kernels.cross_entropy import triton as kernels

    logits, index, row = empty(T, 151936), empty(T, 1, dtype=torch.int64), empty(T, 1, dtype=torch.float32)
    both = {"wgmma": False, "ptx": (READ, WRITE)}
    check(kernels.losses, logits, index, wgmma=False, ptx=(READ,))
    check(kernels.losses, logits, index, row, **both)
    check(kernels.gradient, logits, index, row, empty(3, T, dtype=torch.float32), logits, **both)
    with aot.recorded() as launches:
        kernels.losses(logits, index, row)
    assert aot.build(launches[0]).registers <= 42  # three blocks of 512 threads in 65,536 registers


def test_linear_cross_entropy():
    """Blocks of tokens of unequal size; rows of logits are a multiple of 128 bytes apart, of an odd vocabulary too.

    Who promises proportional weights waits for nothing: a tensor without data has no number to wait for.
    """
    import aot

    from loongforge.kernels.linear_cross_entropy.triton import linear_cross_entropy

    hidden, weight, labels = empty(8192, 64), empty(151669, 64).requires_grad_(), empty(8192, dtype=torch.int64)
    with aot.recorded() as launches:
        loss = linear_cross_entropy(hidden, weight, labels, proportional=True)
        loss.backward(torch.empty_like(loss))
        waiting = linear_cross_entropy(hidden[:5], weight, labels[:5])
        with pytest.raises(RuntimeError, match="meta tensors"):
            waiting.backward(torch.empty_like(waiting))
    assert launches.pop().grid == (5,)
    assert [launch.grid for launch in launches] == [(2816,), (2816,), (2560,)]
    assert {launch.arguments["stride"] for launch in launches} == {151680}
    assert all(launch.arguments["GRADIENT"] for launch in launches)


@pytest.mark.parametrize("columns", [128, 2048, 4096, 7168])  # a head of Qwen3; its models' widths; DeepSeek-V3
def test_rms_norm(columns: int):
    from loongforge.kernels.rms_norm.triton import rms_norm

    def both(x: Tensor, weight: Tensor) -> None:
        rms_norm(x, weight).backward(torch.empty_like(x))

    inputs = empty(8192, columns).requires_grad_(), empty(columns).requires_grad_()
    assert check(both, *inputs, wgmma=False, ptx=(READ, WRITE)) == ["_forward", "_backward"]


def test_swiglu():
    from loongforge.kernels.swiglu.triton import swiglu

    def both(x: Tensor) -> None:
        swiglu(x).backward(empty(T, 768))

    experts = empty(T, 2 * 768).requires_grad_()  # of Qwen3-30B-A3B
    assert check(both, experts, wgmma=False, ptx=(READ, WRITE)) == ["_forward", "_backward"]


def test_rope():
    """Keys of Qwen3 inside a fused QKV; positions of latent attention; a head of Qwen3-Next, turned by a fourth."""
    from loongforge.kernels.rope.triton import turn

    for x, pairs, interleaved in (
        (empty(T, 1, 8, 768)[..., 512:640], 64, False),
        (empty(T, 1, 1, 576)[..., 512:], 32, True),
        (empty(T, 1, 16, 256), 32, False),
    ):
        angle = empty(T, 1, 1, pairs, dtype=torch.float32)
        check(turn, x, angle, angle, interleaved, -1, wgmma=False, ptx=(READ, WRITE))
