"""Ops as torch knows them: `torch.library`, with a kernel per device, so that compiling and checkpointing see one node.

An op's folder has its arithmetic twice: `reference.py` in torch, which runs on every device, and `triton.py`, imported
at the first call on a GPU, so that nothing else needs Triton. Forward and backward are two ops; `register_autograd` in
the folder joins them. In the kernel registry the op's public function is the implementation `triton`, beside
`reference`, which torch differentiates itself; the registry says why one was refused, and takes one by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch.library import CustomOpDef

NAMESPACE = "loongforge"
"""Of the ops: `torch.ops.loongforge.gather_scores`."""


def define(reference: Callable[..., Any], *, cuda: str, fake: Callable[..., Any], name: str = "") -> CustomOpDef:
    """The op `loongforge::<name>`, by default of the reference's name.

    `reference` runs on every device without a kernel of its own, and its annotations are the op's schema; `cuda` is
    the `module:function` that runs on GPUs, with the same arguments and results; `fake` returns empty results of the
    right shapes, dtypes and devices. No argument is written to and no result shares memory with one.
    """
    op = torch.library.custom_op(f"{NAMESPACE}::{name or reference.__name__}", reference, mutates_args=())

    @op.register_kernel("cuda")
    def on_gpu(*inputs: Any) -> Any:
        module, _, function = cuda.partition(":")
        return getattr(import_module(module), function)(*inputs)

    op.register_fake(fake)
    return op
