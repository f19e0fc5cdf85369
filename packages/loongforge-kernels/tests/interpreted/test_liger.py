"""Liger's kernels behind our signatures against our references in fp64, where liger-kernel is installed.

CI does not have it: there `test_peers.py` checks how the adapters call what `peers_recorded.py` has of it. To run it:
`uv run --with liger-kernel==0.8.5 pytest -n0 packages/loongforge-kernels/tests/test_interpreted.py -k liger`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
from device import ON_GPU, fp32
from dsa_inputs import normal
from peers_recorded import LIGER
from torch import Tensor

from loongforge.kernels.testing import assert_matches

pytest.importorskip("liger_kernel")

RATIO = {torch.float32: fp32(4e-7), torch.bfloat16: 8e-3}
"""Measured 1.5e-7 and 3.6e-3 at most."""
DTYPES = pytest.mark.parametrize("dtype", RATIO, ids=str)


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Triton's interpreter hands a kernel Python's floats as they are, while Liger's kernels call `eps.to(...)`; and it
    has nothing of libdevice, from which they take the reciprocal of a root."""
    if ON_GPU:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._implicit_cvt

    def convert(value: Any) -> Any:
        if not isinstance(value, float):
            return original(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    norms = import_module("liger_kernel.ops.rms_norm")
    with (
        mock.patch.object(interpreter, "_implicit_cvt", convert),
        mock.patch.object(norms, "rsqrt", lambda x: tl.rsqrt(x)),
    ):
        yield


def pair(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The adapter, and the truth."""
    liger, truth = import_module("loongforge.kernels.peers.liger"), import_module(f"loongforge.kernels.{op}.reference")
    return getattr(liger, op), getattr(truth, op)


def check(op: str, dtype: torch.dtype, inputs: dict[str, Tensor], **named: Any) -> None:
    """Outputs and gradients, which leave what was given as it was."""
    mine, truth = pair(op)
    before = {name: x.detach().clone() for name, x in inputs.items()}
    assert_matches(partial(mine, **named), partial(truth, **named), inputs, RATIO[dtype])
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


@DTYPES
def test_rms_norm(dtype):
    check(
        "rms_norm",
        dtype,
        {"x": normal(3, 5, 60, seed=1, dtype=dtype), "weight": normal(60, seed=2, dtype=dtype)},
        eps=1e-5,
    )


def test_swiglu():
    check("swiglu", torch.float32, {"x": normal(3, 2, 66, seed=1)})  # the interpreter cannot multiply bf16 numbers


@DTYPES
@pytest.mark.parametrize("batch", [1, 2])
def test_rope(batch, dtype):
    angle = normal(5, batch, 1, 3, seed=3, grad=False)
    angles = {"cos": angle.cos(), "sin": angle.sin()}
    check("rope", dtype, {"x": normal(5, 2, 3, 10, seed=1, dtype=dtype), **angles})


def labels(*shape: int) -> Tensor:
    chosen = torch.randint(17, shape, generator=torch.Generator().manual_seed(1), device="cpu")
    chosen.view(-1)[::4] = -100
    return chosen.to(torch.get_default_device())


@DTYPES
def test_cross_entropy(dtype):
    check("cross_entropy", dtype, {"logits": normal(3, 5, 17, seed=1, dtype=dtype)}, labels=labels(3, 5))


@DTYPES
def test_linear_cross_entropy(dtype):
    inputs = {"hidden": normal(3, 5, 12, seed=1, dtype=dtype), "weight": normal(17, 12, seed=2, dtype=dtype)}
    check("linear_cross_entropy", dtype, inputs, labels=labels(3, 5))


@pytest.mark.parametrize(("module", "name"), LIGER, ids=lambda x: x)
def test_signatures_are_those_recorded(module, name):
    found = getattr(import_module(f"liger_kernel.ops.{module}"), name)
    parameters = inspect.signature(getattr(found, "forward", found)).parameters
    assert [parameter for parameter in parameters if parameter != "ctx"][: len(LIGER[module, name])] == [
        *LIGER[module, name]
    ]
