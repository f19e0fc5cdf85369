"""Tests in `interpreted/` run kernels through Triton's interpreter, corrected where it is wrong, and on a GPU compiled.

The interpreter is chosen by an environment variable before Triton is imported, and then holds for the whole process.
So `test_interpreted.py` starts one pytest for each file in `interpreted/`; an ordinary run collects nothing there. To
run one alone: `TRITON_INTERPRET=1 uv run pytest -n0 packages/loongforge-kernels/tests/interpreted/test_interpreter.py`.
Where torch sees a GPU, an ordinary run collects them too, and the same cases run there (`interpreted/conftest.py`).

What no fix reaches: arithmetic on bf16 and fp8 values other than `tl.dot` (a kernel converts to fp32 at the load),
`tl.atomic_add` on bf16, and whatever needs a compiler: types that differ between branches, registers, shared memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `aot`, `device` and `dsa_inputs`
from device import INTERPRETED, ON_GPU

collect_ignore = [] if INTERPRETED else ["interpreted/test_interpreter.py"] if ON_GPU else ["interpreted"]


def right_dot(original: Any) -> Any:
    """`tl.dot` on bf16.

    Why: the interpreter keeps bf16 as uint16 and multiplies those integers; the result is off by 1e9, without an error.
    How: bf16 operands become fp32, which is exact, before the product; other dtypes take the original path.
    Upstream: Triton 3.6 to 3.9, InterpreterBuilder.create_dot. Remove when interpreted/test_interpreter.py says so.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def wide(operand: Any) -> Any:
        if operand.dtype.scalar == tl.bfloat16:
            return (operand.data.astype(np.uint32) << 16).view(np.float32)
        return operand.data.astype(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return original(self, a, b, d, *rest)
        return TensorHandle(np.matmul(wide(a), wide(b)) + d.data, d.dtype.scalar)

    return create_dot


def right_rounding(original: Any) -> Any:
    """fp32 to bf16 and fp8 as the GPU and torch round: to the nearest, ties to even.

    Why: the interpreter cuts bf16 off (mean error -0.28 %) and loses the carry of fp8 mantissas (up to 8 steps off).
    How: torch's own cast. Values beyond e4m3's 448 become NaN as in torch, while the GPU saturates; kernels clamp.
    Upstream: Triton 3.6 to 3.9, interpreter._convert_float. Remove when interpreted/test_interpreter.py says so.
    """
    import numpy as np
    import torch
    import triton.language as tl

    casts = {
        tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8),
        tl.float8e5: (torch.float8_e5m2, torch.uint8, np.uint8),
    }

    def convert(value: Any, from_dtype: Any, to_dtype: Any, rounding: Any) -> Any:
        if from_dtype != tl.float32 or to_dtype not in casts:
            return original(value, from_dtype, to_dtype, rounding)
        dtype, bits, numpy_bits = casts[to_dtype]
        wide = torch.from_numpy(np.array(value).view(np.float32))
        return wide.to(dtype).view(bits).numpy().view(numpy_bits)

    return convert


def right_index(original: Any) -> Any:
    """The bounds of a loop, and whatever else makes a Python number of one that was computed.

    Why: the interpreter hands an array of one element to `int`, which NumPy 2.5 refuses. How: the array's only item.
    Upstream: Triton 3.6, interpreter._patch_lang_tensor; 3.9 has it right. Remove with the support of what is older.
    """

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


def interpreter_fixes() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, factory of the right one from the original), one for each fix."""
    from triton.runtime import interpreter

    return [
        (interpreter.InterpreterBuilder, "create_dot", right_dot),
        (interpreter, "_convert_float", right_rounding),
        (interpreter, "_patch_lang_tensor", right_index),
    ]


@pytest.fixture(scope="session", autouse=INTERPRETED)
def right_interpreter() -> Iterator[Any]:
    """The interpreter with its fixes; a context manager that lifts them for a while."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in interpreter_fixes()]

    @contextmanager
    def lifted() -> Iterator[None]:
        with ExitStack() as patches:
            for owner, name, original in originals:
                patches.enter_context(mock.patch.object(owner, name, original))
            yield

    with ExitStack() as fixed:
        for owner, name, make in interpreter_fixes():
            fixed.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))
        yield lifted
