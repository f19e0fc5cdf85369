"""One block of rows: losses and the gradient with respect to the logits."""

from __future__ import annotations

import torch
from torch import Tensor


def losses(logits: Tensor, index: Tensor, probabilities: Tensor) -> Tensor:
    """Loss `[R, 1]` of wide logits `[R, V]` at label columns index `[R, 1]`; fills `probabilities` `[R, V]`.

    logsumexp comes from the largest probability, which is at least 1/V and therefore exact to rounding, so that one
    pass of exp serves loss and gradient. `probabilities` may be `logits`: softmax reads a row before it writes it.
    """
    top = logits.amax(-1, keepdim=True)
    picked = logits.gather(1, index)
    torch.softmax(logits, -1, out=probabilities)
    return top.sub_(picked).sub_(probabilities.amax(-1, keepdim=True).log_())


def to_gradient(probabilities: Tensor, index: Tensor, loss: Tensor, factor: Tensor) -> Tensor:
    """Turn probabilities `[R, V]` in place into factor `[R, 1]` times d loss / d logits."""
    # p - 1 at the label; expm1 of the loss keeps its digits where the loss is small
    probabilities.scatter_(1, index, torch.expm1(-loss))
    return probabilities.mul_(factor)
