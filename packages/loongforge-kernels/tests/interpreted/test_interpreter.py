"""The interpreter's fixes: right with them, and wrong without them, or they can go."""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from packaging.version import Version

from loongforge.kernels.testing import error_ratio


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _cast(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def _count(end_ptr, out_ptr):
    turns = 0
    for _ in range(tl.load(end_ptr)):
        turns += 1
    tl.store(out_ptr, turns)


def count(end: int) -> int:
    out = torch.empty(1, dtype=torch.int32)
    _count[(1,)](torch.tensor([end], dtype=torch.int32), out)
    return int(out)


def product(dtype: torch.dtype) -> float:
    torch.manual_seed(0)
    a, b = (torch.randn(16, 16).to(dtype) for _ in range(2))
    out = torch.empty(16, 16)
    _product[(1,)](a, b, out, 16)
    return error_ratio(out, a.double() @ b.double())


def casts(dtype: torch.dtype) -> float:
    """The part of the values that is cast as torch casts them."""
    torch.manual_seed(0)
    x = torch.randn(1024) * torch.logspace(-8, 2, 1024)
    x[:4] = torch.tensor([0.0, -0.0, torch.inf if dtype != torch.float8_e4m3fn else 448.0, torch.nan])
    out = torch.empty(1024, dtype=dtype)
    _cast[(1,)](x, out, 1024)
    bits = torch.int16 if dtype.itemsize == 2 else torch.uint8
    return (out.view(bits) == x.to(dtype).view(bits)).double().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_products(dtype):
    assert product(dtype) < 2e-7  # fp32 sums: measured 7e-8 at most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_casts(dtype):
    assert casts(dtype) == 1.0


def test_loops_end_where_they_are_told():
    assert count(3) == 3


def test_the_fixes_are_still_needed(right_interpreter):
    with right_interpreter():
        assert product(torch.bfloat16) > 1, "Triton multiplies bf16 rightly: remove right_dot"
        wrong = [dtype for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2) if casts(dtype) < 1]
        if Version(triton.__version__) < Version("3.9"):  # which needs no right_index
            with contextlib.suppress(triton.runtime.errors.InterpreterError):
                assert count(3) != 3, "NumPy makes numbers of arrays again: remove right_index"
    assert wrong, "Triton rounds rightly: remove right_rounding"
    assert product(torch.bfloat16) < 2e-7
