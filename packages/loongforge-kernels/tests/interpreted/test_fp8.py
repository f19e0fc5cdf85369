"""Quantisation by blocks through Triton's interpreter: the same codes and scales as torch, bit for bit."""

from __future__ import annotations

import pytest
import torch
from device import ON_GPU

from loongforge.kernels.fp8 import (
    dequantize,
    hadamard_quant,
    quantize_1x128,
    quantize_128x128,
    quantize_rowwise,
    quantize_tensorwise,
    reference,
)
from loongforge.kernels.fp8 import triton as kernels
from loongforge.kernels.library import NAMESPACE
from loongforge.kernels.testing import poison


@pytest.fixture(scope="module", autouse=True)
def kernels_run_on_the_cpu() -> None:
    if ON_GPU:  # there they run as they are registered
        return
    for name, kernel in (
        ("quantize_blocks", kernels.quantize),
        ("hadamard_quant", kernels.hadamard_quant),
        ("dequantize_blocks", kernels.dequantize),
    ):
        torch.library.impl(f"{NAMESPACE}::{name}", "cpu", kernel)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Of many magnitudes, and zeros."""
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-6, 4, shape[0])[:, None]
    x[shape[0] // 2] = 0.0
    return x.to(dtype)


def assert_same(found: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> None:
    for have, right in zip(found, want, strict=True):
        assert have.dtype == right.dtype
        assert torch.equal(have.float(), right.float())


@pytest.mark.parametrize("pow2_scale", [False, True], ids=["any scale", "powers of two"])
@pytest.mark.parametrize("transpose", [False, True], ids=["rows", "columns"])
def test_rows_of_128(pow2_scale, transpose):
    x = numbers(70, 300)
    with poison():
        found = quantize_1x128(x, pow2_scale=pow2_scale, transpose=transpose)
    assert_same(found, reference.quantize(x, (1, 128), 1e-12, pow2_scale, transpose))


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (5, 7)], ids=str)
def test_squares_of_128(shape):
    w = numbers(*shape, dtype=torch.float32)
    with poison():
        found = quantize_128x128(w)
    assert_same(found, reference.quantize(w, (128, 128), 1e-12, False, False))


@pytest.mark.parametrize("transpose", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("op", ["quantize_rowwise", "quantize_tensorwise"])
def test_whole_rows_and_all_of_a_matrix(op, transpose):
    x = numbers(70, 300)
    with poison():
        found = {"quantize_rowwise": quantize_rowwise, "quantize_tensorwise": quantize_tensorwise}[op](
            x, pow2_scale=transpose, transpose=transpose
        )
    assert_same(found, getattr(reference, op)(x, pow2_scale=transpose, transpose=transpose))


@pytest.mark.parametrize("rotate", [False, True], ids=["as it is", "rotated"])
def test_hadamard(rotate):
    x = numbers(70, 128).view(7, 10, 128)
    with poison():
        q, scale = hadamard_quant(x, rotate=rotate, pow2_scale=True)
    want_q, want_scale = reference.hadamard_quant(x, rotate=rotate, pow2_scale=True)
    assert torch.equal(scale, want_scale)
    # sums in another order may fall on the other side of a rounding boundary: measured 0 of 8960
    assert (q.float() != want_q.float()).double().mean() <= (1e-3 if rotate else 0.0)


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (1, 300), (140, 300)], ids=str)
def test_dequantized(block):
    x = numbers(140, 300)
    q, scale = reference.quantize(x, block, 1e-12, False, False)
    with poison():
        assert torch.equal(dequantize(q, scale, block), reference.dequantize(q, scale, block))
