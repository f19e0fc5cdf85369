"""Attention of packed parts against its reference in fp64, and against one softmax at a time."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

from loongforge.kernels.packed_attention import Parts, eager, sdpa
from loongforge.kernels.packed_attention.reference import packed_attention as truth
from loongforge.kernels.registry import Registry
from loongforge.kernels.testing import assert_close, poison

CPU = torch.device("cpu")
# Measured over these shapes, outputs and gradients: fp32 at most 3.3e-7, bf16 at most 5.4e-3; allowed twice that.
RATIO = {torch.float32: 7e-7, torch.bfloat16: 1.1e-2}
SHAPES = [  # query heads, key heads, width, queries and keys of each part
    (1, 1, 4, (1,), (1,)),
    (6, 2, 10, (37, 1, 70), (37, 1, 70)),
    (4, 4, 16, (5, 66, 3), (9, 130, 3)),
    (6, 3, 8, (20, 20), (60, 160)),
]


def inputs(shape: Any, dtype: torch.dtype) -> tuple[list[torch.Tensor], Parts]:
    heads, groups, width, queries, keys = shape
    generator = torch.Generator().manual_seed(heads + sum(keys))
    made = []
    for rows, count in ((queries, heads), (keys, groups), (keys, groups), (queries, heads)):  # the last: gradient
        # as megatron-core hands them over, views of one projection
        tensor = torch.randn(sum(rows), count, width + 3, generator=generator)[..., :width]
        made.append(tensor.to(dtype).detach().requires_grad_())
    return made, Parts.of(queries, keys, CPU)


@pytest.mark.parametrize("dtype", RATIO, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", [eager, sdpa], ids=["eager", "sdpa"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "whole"])
def test_output_and_gradients(impl: Any, causal: bool, shape: Any, dtype: torch.dtype) -> None:
    (query, key, value, grad), parts = inputs(shape, dtype)
    scale = 0.7 * shape[2] ** -0.5
    with poison():
        output = impl.packed_attention(query, key, value, parts, scale, causal)
        found = torch.autograd.grad(output, (query, key, value), grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected = truth(*wide, parts, scale, causal)
    assert output.dtype == dtype
    assert_close("output", output, expected, RATIO[dtype])
    gradients = torch.autograd.grad(expected, wide, grad.double())
    for name, mine, theirs in zip(("query", "key", "value"), found, gradients, strict=True):
        assert_close(name, mine, theirs, RATIO[dtype])


def test_the_reference_is_a_softmax_over_what_a_query_sees() -> None:
    (query, key, value, _), parts = inputs(SHAPES[2], torch.float32)
    query, key, value = (tensor.detach().double() for tensor in (query, key, value))
    # Part 1 has 66 queries after 5, 130 keys after 9: its query 10 sees the first 130 - 66 + 11 of them.
    at, seen = 5 + 10, slice(9, 9 + 75)
    shares = torch.softmax((key[seen, 2] @ query[at, 2]) * 0.3, dim=0)
    expected = shares @ value[seen, 2]
    torch.testing.assert_close(truth(query, key, value, parts, 0.3)[at, 2], expected)


def test_parts_are_refused_that_see_less_than_themselves() -> None:
    for queries, keys in (((3,), (2,)), ((0,), (2,)), ((3, 1), (3,))):
        with pytest.raises(ValueError, match="each has 0 < queries <= keys"):
            Parts.of(queries, keys, CPU)


def test_dropout_is_torchs() -> None:
    (query, key, value, _), parts = inputs(SHAPES[1], torch.float32)
    value = torch.ones_like(value)  # without dropout every output is 1
    output = sdpa.packed_attention(query, key, value, parts, 0.3, dropout=0.5)
    assert 0.9 < output.mean() < 1.1
    assert output.std() > 0.1


class TestVarlen:
    """torch's kernels for many lengths run on a GPU alone: what they are asked for is checked."""

    @pytest.fixture
    def varlen(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        module = pytest.importorskip("torch.nn.attention.varlen", reason="needs torch 2.10")
        from loongforge.kernels.packed_attention import varlen

        names = inspect.signature(module.varlen_attn).parameters

        def stand_in(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor,
            cu_seq_k: torch.Tensor, max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], **rest: Any,
        ) -> torch.Tensor:  # fmt: skip
            assert set(rest) <= set(names)
            assert window_size in ((-1, 0), (-1, -1))
            assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
            parts = Parts.of(cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist(), CPU)
            assert (max_q, max_k) == (max(parts.queries), max(parts.keys))
            assert key.shape[1] == query.shape[1] or rest == {"enable_gqa": True} or "enable_gqa" not in names
            return truth(query, key, value, parts, scale, window_size == (-1, 0))

        monkeypatch.setattr(varlen, "varlen_attn", stand_in)
        monkeypatch.setattr(varlen, "signature", lambda _: inspect.signature(module.varlen_attn))
        return varlen

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "whole"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_asks_for_what_the_op_is(self, varlen: Any, shape: Any, causal: bool) -> None:
        (query, key, value, _), parts = inputs(shape, torch.float32)
        found = varlen.packed_attention(query, key, value, parts, 0.3, causal)
        assert torch.equal(found, truth(query, key, value, parts, 0.3, causal))

    def test_heads_that_are_too_wide_are_refused(self, varlen: Any) -> None:
        query = torch.zeros(1, 1, 257)
        with pytest.raises(AssertionError, match="heads of 257 columns, at most 256; use sdpa"):
            varlen.packed_attention(query, query, query, Parts.of((1,), (1,), CPU), 1.0)

    def test_is_refused_on_a_cpu_with_the_reason(self) -> None:
        choice = Registry.installed().choose("packed_attention", "cpu", torch.bfloat16)
        assert choice.line().startswith("packed_attention: varlen refused (needs cuda, have cpu)")
        assert choice.spec.impl == "eager"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "whole"])
@pytest.mark.parametrize("shape", [(6, 2, 64, (37, 1, 70), (37, 1, 70)), (4, 4, 128, (5, 66, 3), (9, 130, 3))], ids=str)
def test_varlen_on_a_gpu(shape: Any, causal: bool) -> None:
    (query, key, value, grad), parts = inputs(shape, torch.bfloat16)
    there = [tensor.detach().cuda().requires_grad_() for tensor in (query, key, value)]
    parts = Parts.of(parts.queries, parts.keys, torch.device("cuda"))
    choice = Registry.installed().choose("packed_attention", "cuda", torch.bfloat16)
    assert choice.spec.impl == "varlen"
    output = choice.call(*there, parts, shape[2] ** -0.5, causal)
    found = torch.autograd.grad(output, there, grad.detach().cuda())
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected = truth(*wide, Parts.of(parts.queries, parts.keys, CPU), 1 / math.sqrt(shape[2]), causal)
    gradients = torch.autograd.grad(expected, wide, grad.double())
    for name, mine, theirs in zip(
        ("output", "query", "key", "value"), (output, *found), (expected, *gradients), strict=True
    ):
        assert_close(name, mine.cpu(), theirs, RATIO[torch.bfloat16])
