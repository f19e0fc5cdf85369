"""Quantisation by blocks on the CPU: bounds of its error, powers of two, odd shapes, the Hadamard matrix."""

from __future__ import annotations

import pytest
import torch

from loongforge.kernels.fp8 import (
    dequantize,
    hadamard_quant,
    quantize_1x128,
    quantize_128x128,
    quantize_rowwise,
    quantize_tensorwise,
)
from loongforge.kernels.fp8.reference import hadamard
from loongforge.kernels.testing import error_ratio

HALF_STEP = 2**-4
"""Largest relative error of e4m3's three fraction bits."""


def numbers(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]


@pytest.mark.parametrize("pow2_scale", [False, True], ids=["any scale", "powers of two"])
@pytest.mark.parametrize(("quantize", "block"), [(quantize_1x128, (1, 128)), (quantize_128x128, (128, 128))])
def test_error_of_a_round_trip(quantize, block, pow2_scale):
    x = numbers(150, 300)
    q, scale = quantize(x, pow2_scale=pow2_scale)
    assert q.dtype == torch.float8_e4m3fn
    assert scale.shape == (-(-150 // block[0]), 3)
    wide = scale.repeat_interleave(block[0], 0)[:150].repeat_interleave(block[1], 1)[:, :300]
    allowed = (x.abs() * HALF_STEP).maximum(wide * 2**-10)  # half of e4m3's least number, 2 ** -9
    assert ((dequantize(q, scale, block) - x).abs() <= allowed * (1 + 1e-6)).all()
    if pow2_scale:
        assert torch.equal(scale.log2(), scale.log2().round())
    else:
        assert q.float().abs().max() == 448
        assert error_ratio(dequantize(q, scale, block), x) < 0.04  # measured 0.026


def test_a_transpose_is_quantised_along_its_own_rows():
    x = numbers(150, 300)
    for have, want in zip(quantize_1x128(x, transpose=True), quantize_1x128(x.T.contiguous()), strict=True):
        assert torch.equal(have.float(), want.float())


@pytest.mark.parametrize("transpose", [False, True], ids=["rows", "columns"])
def test_whole_rows_and_all_of_a_matrix(transpose):
    x = numbers(150, 300)
    wide = x.T if transpose else x
    for quantize, largest in ((quantize_rowwise, wide.abs().amax(1, True)), (quantize_tensorwise, x.abs().amax())):
        q, scale = quantize(x, transpose=transpose)
        assert torch.equal(scale, (largest / 448).view(scale.shape))
        assert q.is_contiguous()
        allowed = (wide.abs() * HALF_STEP).maximum(scale * 2**-10)
        block = (wide.shape[0] // scale.shape[0], wide.shape[1])
        assert ((dequantize(q, scale, block) - wide).abs() <= allowed * (1 + 1e-6)).all()


def test_what_has_no_rows_has_no_scales():
    assert [tuple(x.shape) for x in quantize_rowwise(torch.ones(0, 5))] == [(0, 5), (0, 1)]
    assert [tuple(x.shape) for x in quantize_tensorwise(torch.ones(0, 5))] == [(0, 5), (0, 1)]


def test_what_is_all_zeros_stays_zero():
    q, scale = quantize_1x128(torch.zeros(2, 128))
    assert not q.float().any()
    assert (scale > 0).all()


@pytest.mark.parametrize("rotate", [False, True], ids=["as it is", "rotated"])
def test_a_rotation_keeps_products(rotate):
    assert torch.equal(hadamard(128, torch.device("cpu")) @ hadamard(128, torch.device("cpu")), 128 * torch.eye(128))
    torch.manual_seed(0)
    q, k = torch.randn(16, 128), torch.randn(64, 128)
    narrow = [
        codes.double() * scale.double()[:, None] for codes, scale in (hadamard_quant(x, rotate=rotate) for x in (q, k))
    ]
    assert error_ratio(narrow[0] @ narrow[1].T, (q @ k.T).double()) < 0.05  # measured 0.036
    with pytest.raises(ValueError, match="hadamard_quant: rows of 64 numbers, 128 is what it rotates"):
        hadamard_quant(q[:, :64])


def test_a_scale_of_another_shape_is_refused():
    q, scale = quantize_1x128(torch.ones(4, 256))
    with pytest.raises(ValueError, match=r"scale is \(4, 2\), \(1, 2\) is what blocks of \(128, 128\) need"):
        dequantize(q, scale, (128, 128))


def test_ops_as_torch_wants_them():
    ops, x = torch.ops.loongforge, torch.randn(3, 128)
    for op, arguments in (
        (ops.quantize_blocks, (torch.randn(5, 200), 1, 128, 1e-12, False, True)),
        (ops.hadamard_quant, (x, True, 1e-12, True)),
        (ops.dequantize_blocks, (*quantize_1x128(x), 1, 128)),
    ):
        # the rest of opcheck adds fp8 numbers, which torch cannot
        torch.library.opcheck(op.default, arguments, test_utils="test_faketensor")
