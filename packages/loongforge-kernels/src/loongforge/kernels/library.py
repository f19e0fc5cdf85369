"""Ops as torch knows them: `torch.library`, with a kernel per device, so that compiling and checkpointing see one node.

An op's folder has its arithmetic twice: `reference.py` in torch, which runs on every device, and `triton.py`, imported
at the first call on a GPU, so that nothing else needs Triton. Forward and backward are two ops; `register_autograd` in
the folder joins them. In the kernel registry the op's public function is the implementation `triton`, beside
`reference`, which torch differentiates itself; the registry says why one was refused, and takes one by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch._ops import OpOverload

NAMESPACE = "loongforge"
"""Of the ops: `torch.ops.loongforge.gather_scores`."""


@dataclass(frozen=True, slots=True)
class Op:
    """An op of torch's dispatcher."""

    overload: OpOverload

    def __call__(self, *inputs: Any) -> Any:
        return self.overload(*inputs)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Make it differentiable, as `torch.library.register_autograd` says."""
        torch.library.register_autograd(self.overload, backward, setup_context=setup_context)


def define(reference: Callable[..., Any], *, cuda: str, fake: Callable[..., Any], name: str = "") -> Op:
    """The op `loongforge::<name>`, by default of the reference's name.

    `reference` runs on every device without a kernel of its own, and its annotations are the op's schema; `cuda` is
    the `module:function` that runs on GPUs, with the same arguments and results; `fake` returns empty results of the
    right shapes, dtypes and devices. No argument is written to and no result shares memory with one.

    Made of the parts of `torch.library.custom_op`, which imports torch's compiler, six seconds, at an op's first call.
    """
    name = name or reference.__name__
    full = f"{NAMESPACE}::{name}"

    def on_gpu(*inputs: Any) -> Any:
        module, _, function = cuda.partition(":")
        return getattr(import_module(module), function)(*inputs)

    torch.library.define(full, torch.library.infer_schema(reference, mutates_args=()))
    torch.library.impl(full, "default", reference)
    torch.library.impl(full, "cuda", on_gpu)
    torch.library.register_fake(full, fake)
    return Op(getattr(getattr(torch.ops, NAMESPACE), name).default)
