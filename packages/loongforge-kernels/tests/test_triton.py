"""The Triton kernels against the fp64 reference: through Triton's interpreter here, and compiled for an absent GPU.

The interpreter is chosen by an environment variable when the kernel's module is imported, hence the subprocess.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from device import FP32_ON_GPU

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs pip install triton")

RATIO = 4e-7

INTERPRETED = """
import torch
if ON_GPU:
    torch.set_default_device("cuda")
from loongforge.kernels.rms_norm.reference import rms_norm as rms_norm_truth
from loongforge.kernels.rms_norm.triton import rms_norm
from loongforge.kernels.swiglu.reference import swiglu as swiglu_truth
from loongforge.kernels.swiglu.triton import swiglu
from loongforge.kernels.testing import assert_close, poison

def check(name, op, truth, *shapes):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    with poison():
        y = op(*inputs)
        grad = torch.randn(y.shape)
        y.backward(grad)
    expected = truth(*wide)
    expected.backward(grad.double())
    # fp32 rounding: measured 1.6e-7 at most
    pairs = [(y, expected), *((x.grad, x_wide.grad) for x, x_wide in zip(inputs, wide))]
    for number, (have, want) in enumerate(pairs):
        assert_close(f"{name} {shapes} {number}", have, want, RATIO)

for shape in ((1, 4), (3, 5), (2, 4, 60), (5, 1, 257), (300, 16)):
    check("rms_norm", rms_norm, rms_norm_truth, shape, shape[-1:])
for shape in ((1, 2), (3, 10), (2, 4, 66), (5, 2100)):
    check("swiglu", swiglu, swiglu_truth, shape)
assert rms_norm(torch.empty(0, 4), torch.ones(4)).shape == (0, 4)
assert swiglu(torch.empty(0, 4)).shape == (0, 2)
print("equal")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from loongforge.kernels.rms_norm import triton as rms
from loongforge.kernels.swiglu import triton as swi

def build(kernel, types, **constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kind
                 for name, kind in zip(names, [*types, *["constexpr"] * len(constants)], strict=True)}
    source = ASTSource(kernel, signature=signature, constexprs={(names.index(k),): v for k, v in constants.items()})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

for kind in ("*fp32", "*bf16"):
    build(rms._forward, [kind, kind, kind, "*fp32", "i32", "fp32"], BLOCK=1024)
    build(rms._backward, [kind, kind, kind, "*fp32", kind, "*fp32", "i32", "i32", "i32"], BLOCK=1024)
    build(swi._forward, [kind, kind, "i32"], BLOCK=1024)
    build(swi._backward, [kind, kind, kind, "i32"], BLOCK=1024)
print("built")
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_interpreted_kernels_equal_the_reference():
    assert run(f"ON_GPU, RATIO = False, {RATIO}\n{INTERPRETED}", TRITON_INTERPRET="1") == "equal"


@pytest.mark.gpu
def test_compiled_kernels_equal_the_reference():
    assert run(f"ON_GPU, RATIO = True, {FP32_ON_GPU * RATIO}\n{INTERPRETED}", TRITON_INTERPRET="0") == "equal"


def test_kernels_compile_for_hopper(tmp_path):
    assert run(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "built"
