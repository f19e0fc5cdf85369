"""The kernels of sparse attention through Triton's interpreter against the reference in fp64, gradients included."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from device import fp32
from dsa_inputs import masked, normal, sparse
from torch import Tensor

from loongforge.kernels.attention_target import triton as target_kernel
from loongforge.kernels.attention_target.reference import attention_target as target_truth
from loongforge.kernels.indexer_kl import reference as kl_truth
from loongforge.kernels.indexer_kl import triton as kl_kernels
from loongforge.kernels.masked_mha import reference as masked_truth
from loongforge.kernels.masked_mha import triton as masked_kernels
from loongforge.kernels.sparse_mla import reference as sparse_truth
from loongforge.kernels.sparse_mla import triton as sparse_kernels
from loongforge.kernels.testing import ZOO, Rows, assert_close, assert_matches
from loongforge.kernels.tiles import Tiles

RATIO = fp32(3e-6)
"""fp32 rounding: measured 6e-7 at most, and 1.4e-6 where a query has one key and its gradient is a difference to 0."""
BF16_RATIO = 6e-3
"""bf16 rounding of probabilities and results, measured 3.1e-3 at most."""
EVERY_ROW = pytest.mark.parametrize("rows", ZOO, ids=lambda rows: rows.name)
SMALL = Tiles(rows=16, keys=16, swap=True)
WIDE = Rows(name="full width", documents=(40,), queries=(0, 39, 7), topk=70)
NOTHING = ZOO[5]
ODD = Rows(name="odd", documents=(37,), topk=5, queries=(0, 15, 16, 36))
"""Of the zoo's, some queries: kernels that take one query at a time see no more in all of them."""
QUERY_BY_QUERY = pytest.mark.parametrize("rows", [ZOO[0], ODD, *ZOO[2:]], ids=lambda rows: rows.name)


class _Op(torch.autograd.Function):
    """Two functions of kernels as one differentiable op, as `torch.library` joins them."""

    @staticmethod
    def forward(ctx: Any, forward: Any, backward: Any, *inputs: Any) -> Any:
        output = forward(*inputs)
        ctx.backward, ctx.count = backward, len(inputs)
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = ctx.saved_tensors
        found = ctx.backward(saved[: ctx.count], saved[ctx.count :], grads)
        return None, None, *found, *[None] * (ctx.count - len(found))


def masked_op(scale: float, tiles: Tiles = SMALL) -> Any:
    def backward(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Any:
        return masked_kernels.backward(*inputs, scale, *outputs, *grads, tiles, tiles)

    forward = partial(masked_kernels.forward, scale=scale, tiles=tiles)
    return lambda q, k, v, ks, ke, bits=None: _Op.apply(forward, backward, q, k, v, bits, ks, ke)


def sparse_op(scale: float, d_v: int, deterministic: bool, tiles: Tiles = SMALL, chunk_bytes: int = 1 << 30) -> Any:
    def forward(q: Tensor, kv: Tensor, indices: Tensor, attn_sink: Tensor | None) -> Any:
        return sparse_kernels.forward(q, kv, indices, scale, d_v, attn_sink, deterministic, tiles)

    def backward(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Any:
        dq, dkv, dsink = sparse_kernels.backward(
            *inputs, scale, deterministic, *outputs, *grads, tiles, Tiles(rows=32, keys=16), chunk_bytes
        )
        return dq, dkv, None, None if inputs[3] is None else dsink

    return lambda q, kv, indices, attn_sink=None: _Op.apply(forward, backward, q, kv, indices, attn_sink)


def sparse_reference(scale: float, d_v: int) -> Any:
    return partial(sparse_truth.sparse_mla, scale=scale, d_v=d_v)


@EVERY_ROW
def test_masked_mha(rows: Rows):
    truth = partial(masked_truth.masked_mha, scale=0.3)
    assert_matches(masked_op(0.3), truth, masked(rows, 2, 24, 16), RATIO)


def test_masked_mha_without_bits_and_with_other_tiles():
    inputs = masked(Rows(name="two", documents=(20, 31), topk=1), 1, 80, 32)
    del inputs["bits"]
    for tiles in (Tiles(rows=16, keys=32), Tiles(rows=32, keys=16)):
        assert_matches(masked_op(0.2, tiles), partial(masked_truth.masked_mha, bits=None, scale=0.2), inputs, RATIO)


def test_masked_mha_at_the_released_width_in_bf16():
    inputs = masked(WIDE, 1, 192, 128, torch.bfloat16)
    assert_matches(masked_op(192**-0.5), partial(masked_truth.masked_mha, scale=192**-0.5), inputs, BF16_RATIO)


@QUERY_BY_QUERY
def test_sparse_mla(rows: Rows):
    inputs = sparse(rows, 3, 64, 16)  # three heads: a partial block, keys on the rows of the products
    assert_matches(sparse_op(0.15, 64, False), sparse_reference(0.15, 64), inputs, RATIO)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30], ids=["query by query", "at once"])
def test_sparse_mla_with_an_ordered_backward(chunk_bytes: int):
    inputs = sparse(NOTHING, 3, 64, 16)
    op = sparse_op(0.15, 64, True, chunk_bytes=chunk_bytes)
    assert_matches(op, sparse_reference(0.15, 64), inputs, RATIO)


@pytest.mark.parametrize("heads", [16, 72])
def test_sparse_mla_with_a_sink_and_many_heads(heads: int):
    inputs = sparse(Rows(name="few", documents=(9,), queries=(0, 8, -1, 5), topk=20), heads, 64, 16)
    inputs["attn_sink"] = normal(heads, seed=4)
    tiles = Tiles(rows=min(heads, 64), keys=16, swap=heads == 16)
    assert_matches(sparse_op(0.15, 64, True, tiles), sparse_reference(0.15, 64), inputs, RATIO)


def test_sparse_mla_at_the_released_width_in_bf16():
    inputs = sparse(WIDE, 2, 512, 64, torch.bfloat16)
    op = sparse_op(576**-0.5, 512, False, Tiles(rows=16, keys=64, swap=True))
    assert_matches(op, sparse_reference(576**-0.5, 512), inputs, BF16_RATIO)


@pytest.mark.parametrize(
    ("rows", "heads"),
    [*((rows, 3) for rows in (ZOO[0], ODD, *ZOO[2:])), (NOTHING, 70)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_attention_target(rows: Rows, heads: int):
    inputs = {name: x.detach() for name, x in sparse(rows, heads, 64, 16).items()}
    _, lse = sparse_truth.sparse_mla(*inputs.values(), 0.15, 64)
    tiles = Tiles(rows=16 if heads == 3 else 64, keys=16, swap=heads == 3)
    found = target_kernel.attention_target(*inputs.values(), lse, 0.15, tiles)
    wide = [x.double() if x.is_floating_point() else x for x in (*inputs.values(), lse)]
    assert_close("target", found, target_truth(*wide, 0.15), RATIO)
    assert_close("sum", found.sum(1), heads * (lse > float("-inf")).any(1).double(), RATIO)


@EVERY_ROW
def test_indexer_divergence(rows: Rows, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kl_kernels, "BLOCK", 8)  # rows in several turns
    missing = rows.indices() < 0
    scores = normal(*missing.shape, seed=1, grad=False).masked_fill(missing, float("-inf")).requires_grad_()
    target = normal(*missing.shape, seed=2, grad=False).square()
    target[:1] = 0.0  # attention that gave nothing to any key

    def op(scores: Tensor, target: Tensor) -> Tensor:
        def backward(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Any:
            return (kl_kernels.backward(*inputs, *outputs[1:], grads[0]),)

        return _Op.apply(kl_kernels.forward, backward, scores, target)[0]

    assert_matches(op, kl_truth.divergence, {"scores": scores, "target": target}, RATIO)
