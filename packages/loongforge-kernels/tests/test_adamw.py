"""The fused AdamW step against the plain one and against torch.optim.AdamW."""

from __future__ import annotations

import pytest
import torch

from loongforge.kernels.adamw import adamw
from loongforge.kernels.adamw.reference import adamw as adamw_truth
from loongforge.kernels.testing import assert_close

HYPER = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@pytest.mark.parametrize("step_of", [adamw, adamw_truth], ids=["eager", "reference"])
def test_ten_steps(step_of):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (1,), (129,)]
    ours = [torch.randn(s, generator=generator) for s in shapes]
    theirs = [torch.nn.Parameter(p.double()) for p in ours]
    optimizer = torch.optim.AdamW(theirs, foreach=False, **HYPER)
    first, second = ([torch.zeros_like(p) for p in ours] for _ in range(2))
    for step in range(1, 11):
        grads = [torch.randn(s, generator=generator) for s in shapes]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.double()
        optimizer.step()
        step_of(ours, grads, first, second, step=step, **HYPER)
    for number, (have, want) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(f"parameter {number}", have, want, 5e-7)  # measured 1.2e-7: fp32 rounding over ten steps


def test_nothing_to_update():
    adamw([], [], [], [], step=1, lr=1.0)
