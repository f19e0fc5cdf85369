"""Causal attention against its reference in fp64, and no less exact than torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from loongforge.kernels.causal_attention import causal_attention
from loongforge.kernels.causal_attention.reference import causal_attention as truth
from loongforge.kernels.testing import assert_close, error_ratio, poison

# Measured over these shapes, outputs and gradients: fp32 at most 3.2e-7, bf16 at most 6.4e-3; allowed twice that.
RATIO = {torch.float32: 7e-7, torch.bfloat16: 1.3e-2}
SHAPES = [  # batch, query heads, key heads, length, width
    (1, 1, 1, 1, 4),
    (2, 6, 2, 37, 10),
    (1, 4, 4, 64, 16),
    (2, 6, 3, 65, 8),
    (1, 12, 4, 200, 24),
    (1, 2, 1, 1100, 12),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, strided: bool = False) -> list[torch.Tensor]:
    batch, heads, groups, length, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    made = []
    for count in (heads, groups, groups, heads):  # query, key, value, gradient
        if strided:  # as megatron-core hands them over: [S, B, N, D] turned around
            tensor = torch.randn(length, batch, count, width, generator=generator).permute(1, 2, 0, 3)
        else:
            tensor = torch.randn(batch, count, length, width, generator=generator)
        made.append(tensor.to(dtype).detach().requires_grad_())
    return made


@pytest.mark.parametrize("dtype", RATIO, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keep_bytes", [1 << 30, 0], ids=["kept", "recomputed"])
def test_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, keep_bytes: int) -> None:
    query, key, value, grad = inputs(shape, dtype, strided=True)
    scale = 0.7 * shape[-1] ** -0.5
    with poison():
        output = causal_attention(query, key, value, scale, keep_bytes)
        found = torch.autograd.grad(output, (query, key, value), grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected = truth(*wide, scale)
    assert_close("output", output, expected, RATIO[dtype])
    for name, mine, theirs in zip(
        ("query", "key", "value"), found, torch.autograd.grad(expected, wide, grad.double()), strict=True
    ):
        assert mine.dtype == dtype
        assert_close(name, mine, theirs, RATIO[dtype])


@pytest.mark.parametrize("keep_bytes", [1 << 30, 0], ids=["kept", "recomputed"])
def test_the_end_of_a_longer_sequence(keep_bytes: int) -> None:
    query, key, value, grad = inputs((2, 6, 2, 150, 10), torch.float64)
    whole = torch.autograd.grad(causal_attention(query, key, value, 0.3, keep_bytes)[:, :, 50:], value, grad[:, :, 50:])
    output = causal_attention(query[:, :, 50:], key, value, 0.3, keep_bytes)
    torch.testing.assert_close(output, causal_attention(query, key, value, 0.3)[:, :, 50:])
    torch.testing.assert_close(torch.autograd.grad(output, value, grad[:, :, 50:]), whole)


@pytest.mark.parametrize("dtype", RATIO, ids=str)
def test_no_less_exact_than_torch(dtype: torch.dtype) -> None:
    query, key, value, grad = inputs((2, 6, 2, 300, 32), dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected = torch.autograd.grad(truth(*wide, 32**-0.5), wide, grad.double())
    ours = torch.autograd.grad(causal_attention(query, key, value, 32**-0.5), (query, key, value), grad)
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torchs = torch.autograd.grad(output, (query, key, value), grad)
    for mine, theirs, right in zip(ours, torchs, expected, strict=True):
        # bf16 rounds the probabilities, torch's keeps a block of them wide: measured 2.0 times its error at most
        assert error_ratio(mine, right) < 3 * error_ratio(theirs, right)


def test_the_future_has_no_influence() -> None:
    query, key, value, _ = inputs((1, 4, 2, 130, 8), torch.float32)
    before = causal_attention(query, key, value, 0.3)
    with torch.no_grad():
        key[:, :, 100:] += 5
        value[:, :, 100:] -= 3
    after = causal_attention(query, key, value, 0.3)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.equal(before[:, :, 100:], after[:, :, 100:])


def test_gradcheck() -> None:
    query, key, value, _ = (
        tensor.detach().double().requires_grad_() for tensor in inputs((1, 4, 2, 5, 3), torch.float32)
    )
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, 0.5), (query, key, value))
