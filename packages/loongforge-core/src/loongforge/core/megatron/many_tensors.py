"""megatron-core's work on lists of tensors where neither Apex nor TransformerEngine is: few launches, no wait.

Its own stand-ins ask the device for the norm of every tensor by itself, and multiply each into a new tensor that they
then copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loongforge.core.platform.substitution import REASON, Substitution


def norm_of(chunk: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """Euclidean norm `[1]`, fp32 on the device of the tensors, of all numbers of all lists together."""
    tensors = [one for each in lists for one in each]
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def scale(chunk: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], factor: float) -> None:
    """Every tensor of the second list becomes its fellow of the first times `factor`; they may be the same."""
    sources, targets = (list(one) for one in lists)
    if all(source is target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, factor)
    else:
        torch._foreach_copy_(targets, sources if factor == 1 else torch._foreach_mul(sources, factor))


def substitutions() -> tuple[Substitution, ...]:
    """What applies here: not where another has taken the place, as the CPU's exact norm. Imports megatron-core, hence a
    function."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    upstream = "utils.py local_multi_tensor_l2_norm and local_multi_tensor_scale"
    remove_when = "its stand-ins for Apex neither wait for the device nor copy what they could change in place"
    wanted = (
        (clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm, norm_of, "the device is asked for every norm"),
        (clip_grads, "multi_tensor_scale_impl", utils.local_multi_tensor_scale, scale, "a product, then a copy, each"),
        (optimizer, "multi_tensor_scale_impl", utils.local_multi_tensor_scale, scale, "a product, then a copy, each"),
    )
    return tuple(
        Substitution(
            owner=owner, name=name, make=lambda _, ours=ours: partial(ours), why=why, upstream=upstream,
            remove_when=remove_when,
        )
        for owner, name, theirs, ours, why in wanted
        if getattr(owner, name) is theirs or getattr(getattr(owner, name), REASON, None) == why
    )  # fmt: skip
