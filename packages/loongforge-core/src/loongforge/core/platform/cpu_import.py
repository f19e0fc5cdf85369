"""Import megatron-core without torch's compiler.

Why: megatron-core decorates small functions with `torch.compile` at import, which loads dynamo and inductor (about ten
seconds) and would compile C++ at the first step. Upstream: megatron/core/jit.py. How: the decorator is the identity
while the package is imported, and megatron-core's own switch (`disable_jit_fuser`) covers modules imported later.
Remove when: megatron-core lets a caller turn its fuser off before it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def import_without_compiler() -> None:
    """Import `megatron.core` with its fuser off; `torch.compile` itself is as before afterwards."""

    def identity(model: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
        return model if model is not None else lambda function: function

    compile_, torch.compile = torch.compile, identity  # pyright: ignore[reportAttributeAccessIssue]
    try:
        from megatron.core import jit

        jit.disable_jit_fuser()
    finally:
        torch.compile = compile_
