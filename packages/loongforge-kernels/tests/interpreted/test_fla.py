"""fla-core's kernels behind our signatures against our references in fp64, where fla-core is installed.

CI does not have it: there `test_peers.py` checks how the adapters call what `peers_recorded.py` has of it. To run it:
`uv run --with fla-core==0.6.0 pytest -n0 packages/loongforge-kernels/tests/test_interpreted.py -k fla`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
from dsa_inputs import normal
from peers_recorded import FLA
from torch import Tensor

from loongforge.kernels.testing import assert_matches

pytest.importorskip("fla")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says that there is no GPU
    import_module("fla.modules")

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numbers too large or NaN in lanes that are thrown away

RATIO = {torch.float32: 4e-7, torch.bfloat16: 5e-3, torch.float16: 5e-4}
"""Measured 1.6e-7, 2.3e-3 and 2.4e-4 at most."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Number(int):
    """What a loop counts with, converted as Triton's compiler converts it."""

    def to(self, dtype: Any) -> Number:
        return self


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Kernels that are tuned take their first configuration: there is nothing to measure here. And Triton's interpreter
    counts loops by Python's integers, while those over chunks call `i_t.to(...)`."""
    from triton.runtime.autotuner import Autotuner

    def first(self: Autotuner, *arguments: Any, **named: Any) -> Any:
        return self.fn.run(*arguments, **named, **self.configs[0].all_kwargs())

    def count(*bounds: Any) -> Iterator[Number]:
        return map(Number, range(*bounds))

    chunks = import_module("fla.ops.common.chunk_delta_h")
    with mock.patch.object(Autotuner, "run", first), mock.patch.object(chunks, "range", count, create=True):
        yield


def check(op: str, dtype: torch.dtype, inputs: dict[str, Tensor], ratio: float | None = None, **named: Any) -> None:
    """Outputs and gradients, which leave what was given as it was."""
    mine = getattr(import_module("loongforge.kernels.peers.fla"), op)
    truth = getattr(import_module(f"loongforge.kernels.{op}.reference"), op)
    before = {name: x.detach().clone() for name, x in inputs.items()}
    assert_matches(partial(mine, **named), partial(truth, **named), inputs, ratio or RATIO[dtype])
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


@DTYPES
@pytest.mark.parametrize("width", [60, 520])  # several rows at a time, one row at a time
def test_rms_norm(width, dtype):
    inputs = {"x": normal(3, 5, width, seed=1, dtype=dtype), "weight": normal(width, seed=2, dtype=dtype)}
    check("rms_norm", dtype, inputs, eps=1e-3)


def test_rms_norm_with_a_wide_weight():
    inputs = {"x": normal(3, 5, 60, seed=1, dtype=torch.bfloat16), "weight": normal(60, seed=2)}
    check("rms_norm", torch.bfloat16, inputs)


@DTYPES
def test_swiglu(dtype):
    check("swiglu", dtype, {"x": normal(3, 2, 66, seed=1, dtype=dtype)})


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_rope(batch, interleaved, dtype):
    angle = normal(5, batch, 1, 3, seed=3, grad=False)
    angles = {"cos": 1.3 * angle.cos(), "sin": 1.3 * angle.sin()}
    inputs = {"x": normal(5, 2, 3, 10, seed=1, dtype=dtype), **angles}
    check("rope", dtype, inputs, interleaved=interleaved)


def test_rope_by_narrow_angles():
    angle = normal(5, 1, 1, 3, seed=3, grad=False)
    angles = {"cos": angle.cos().bfloat16(), "sin": angle.sin().bfloat16()}
    check("rope", torch.bfloat16, {"x": normal(5, 2, 3, 10, seed=1, dtype=torch.bfloat16), **angles})


@DTYPES
@pytest.mark.parametrize("vocabulary", [17, 70000])
def test_cross_entropy(vocabulary, dtype):
    labels = torch.randint(vocabulary, (3, 5), generator=torch.Generator().manual_seed(1))
    labels.view(-1)[::4] = -100
    check("cross_entropy", dtype, {"logits": normal(3, 5, vocabulary, seed=1, dtype=dtype)}, labels=labels)


@pytest.mark.parametrize("dtype", RATIO, ids=str)
@pytest.mark.parametrize("ends", [None, (0, 3, 70, 71, 90)], ids=["whole", "packed"])
def test_causal_convolution(ends, dtype):
    rows = 2 if ends is None else 1
    inputs = {"x": normal(rows, 90, 20, seed=1, dtype=dtype), "weight": normal(20, 4, seed=2, dtype=dtype)}
    check("causal_convolution", dtype, inputs, ends=ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # inside, the interpreter has no bf16
@pytest.mark.parametrize("ends", [None, (0, 3, 70, 71, 90)], ids=["whole", "packed"])
def test_gated_delta_rule(ends, dtype):
    rows, heads, repeats, width, wide = 2 if ends is None else 1, 2, 2, 32, 64
    decay = -torch.nn.functional.softplus(3 * normal(rows, 90, heads, repeats, seed=4, grad=False))
    inputs = {
        "q": normal(rows, 90, heads, width, seed=1, dtype=dtype),
        "k": normal(rows, 90, heads, width, seed=2, dtype=dtype),
        "v": normal(rows, 90, heads, repeats, wide, seed=3, dtype=dtype),
        "decay": decay.requires_grad_(),
        "beta": normal(rows, 90, heads, repeats, seed=5, grad=False).sigmoid().to(dtype).requires_grad_(),
    }
    ratio = 6e-6 if dtype == torch.float32 else 1.3e-3  # measured 2.7e-6 and 6.3e-4 at most
    check("gated_delta_rule", dtype, inputs, ratio, ends=ends)


@pytest.mark.parametrize(("module", "name"), FLA, ids=lambda x: x)
def test_signatures_are_those_recorded(module, name):
    found = getattr(import_module(f"fla.{module}"), name)
    function = getattr(getattr(found, "__self__", None), "forward", found)  # `apply` of an autograd function
    parameters = [name for name in inspect.signature(function).parameters if name != "ctx"]
    assert parameters[: len(FLA[module, name])] == [*FLA[module, name]]
