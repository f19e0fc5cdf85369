"""The kernels that work on rows through Triton's interpreter against fp64: norm, gate and rotation; habits of all."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from device import fp32
from dsa_inputs import normal
from torch import Tensor

from loongforge.kernels.cross_entropy.reference import cross_entropy as cross_entropy_truth
from loongforge.kernels.cross_entropy.triton import cross_entropy
from loongforge.kernels.linear_cross_entropy.triton import linear_cross_entropy
from loongforge.kernels.rms_norm import triton as norm
from loongforge.kernels.rms_norm.reference import rms_norm as rms_norm_truth
from loongforge.kernels.rms_norm.triton import rms_norm
from loongforge.kernels.rope.reference import rope as rope_truth
from loongforge.kernels.rope.triton import rope
from loongforge.kernels.swiglu.reference import swiglu as swiglu_truth
from loongforge.kernels.swiglu.triton import swiglu
from loongforge.kernels.testing import assert_close, assert_matches

RATIO = {torch.float32: fp32(4e-7), torch.bfloat16: 4e-3}
"""Measured 1.6e-7 and 1.7e-3 at most: every result is rounded once."""
DTYPES = pytest.mark.parametrize("dtype", RATIO, ids=str)


def angles(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    angle = normal(*shape, seed=3, grad=False)
    return {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}


@DTYPES
@pytest.mark.parametrize("shape", [(1, 4), (3, 5), (2, 4, 60), (5, 1, 257), (300, 16), (2, 2300)], ids=str)
def test_rms_norm(shape, dtype, monkeypatch):
    monkeypatch.setattr(norm, "BACKWARD_WARPS", 8 if shape[0] == 300 else 4096)  # several turns of a program
    given = {"x": normal(*shape, seed=1, dtype=dtype), "weight": normal(shape[-1], seed=2, dtype=dtype)}
    assert_matches(partial(rms_norm, eps=1e-5), partial(rms_norm_truth, eps=1e-5), given, RATIO[dtype])


def test_rms_norm_takes_views(monkeypatch):
    """Keys inside a fused QKV are not copied; the weight of a zero-centred norm is fp32 beside a 16-bit x."""
    fused, weight = normal(5, 2, 3, 40, seed=1, grad=False), normal(12, seed=2)
    keys = fused[..., 16:28].requires_grad_()
    monkeypatch.setattr(norm, "adjacent", lambda x: x if x.stride(1) == 1 else pytest.fail("a copy"))
    assert_matches(rms_norm, rms_norm_truth, {"x": keys, "weight": weight}, RATIO[torch.float32])
    half = keys.detach().bfloat16().requires_grad_()
    assert_matches(rms_norm, rms_norm_truth, {"x": half, "weight": weight}, RATIO[torch.bfloat16])
    assert rms_norm(torch.empty(0, 4), torch.ones(4)).shape == (0, 4)


@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (2, 4, 66), (5, 2100), (17, 1536)], ids=str)
def test_swiglu(shape):
    assert_matches(swiglu, swiglu_truth, {"x": normal(*shape, seed=1)}, RATIO[torch.float32])
    assert swiglu(torch.empty(0, 4)).shape == (0, 2)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("columns", "pairs", "batch"), [(8, 4, 1), (10, 3, 1), (64, 32, 2), (2, 1, 2), (48, 8, 1)])
def test_rope(columns, pairs, batch, interleaved, dtype):
    turns = angles(5, batch, 1, pairs, dtype=dtype if columns == 64 else torch.float32)
    op, truth = (partial(one, interleaved=interleaved) for one in (rope, rope_truth))
    assert_matches(op, truth, {"x": normal(5, 2, 3, columns, seed=1, dtype=dtype), **turns}, RATIO[dtype])


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 3, 2, 2, 4)], ids=str)
def test_rope_of_other_dimensions(shape):
    turns = angles(*shape[:-1], 2)
    assert_matches(rope, rope_truth, {"x": normal(*shape, seed=1), **turns}, RATIO[torch.float32])


def test_rope_takes_views_and_gradients_of_any_order(monkeypatch):
    """Keys inside a fused QKV, then heads before positions; neither is copied."""
    fused = normal(5, 2, 3, 40, seed=1)
    keys, turns = fused[..., 16:28], angles(5, 1, 1, 4)
    monkeypatch.setattr(Tensor, "contiguous", lambda x: pytest.fail("a copy"))
    grad = normal(2, 3, 5, 12, seed=2, grad=False).permute(2, 0, 1, 3)
    found = torch.autograd.grad(rope(keys, **turns), fused, grad)[0]
    wide = fused.detach().double().requires_grad_()
    expected = torch.autograd.grad(rope_truth(wide[..., 16:28], **turns), wide, grad.double())[0]
    assert_close("fused", found, expected, RATIO[torch.float32])
    assert rope(keys[:0], **{name: angle[:0] for name, angle in turns.items()}).shape == (0, 2, 3, 12)


TURNS = angles(5, 1, 1, 4)
OPS = {
    "rms_norm": (rms_norm, rms_norm_truth, {"x": (5, 3, 12), "weight": (12,)}),
    "swiglu": (swiglu, swiglu_truth, {"x": (5, 3, 12)}),
    "rope": (partial(rope, **TURNS), lambda x: rope_truth(x, **TURNS), {"x": (5, 2, 3, 12)}),
    "cross_entropy": (
        lambda x: cross_entropy(x, torch.tensor([1, -100, 0])),
        lambda x: cross_entropy_truth(x, torch.tensor([1, -100, 0])),
        {"x": (3, 7)},
    ),
    "linear_cross_entropy": (
        lambda x, weight: linear_cross_entropy(x, weight, torch.tensor([1, -100, 0])),
        lambda x, weight: cross_entropy_truth(x @ weight.t(), torch.tensor([1, -100, 0])),
        {"x": (3, 6), "weight": (9, 6)},
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_autograd(name):
    """A gradient of one number for all, a second backward pass, what is frozen, and no graph where none is asked."""
    op, truth, shapes = OPS[name]
    given = {key: normal(*shape, seed=number) for number, (key, shape) in enumerate(shapes.items())}
    wide = {key: x.detach().double().requires_grad_() for key, x in given.items()}
    total = op(**given).sum()
    expected = torch.autograd.grad(truth(**wide).sum(), list(wide.values()))
    for _ in range(2):
        found = torch.autograd.grad(total, list(given.values()), retain_graph=True)
        for key, have, want in zip(given, found, expected, strict=True):
            assert_close(f"{name}, {key}", have, want, fp32(1e-6))
    for frozen in given if len(given) > 1 else ():
        some = {key: x.detach() if key == frozen else x for key, x in given.items()}
        left = [x for key, x in given.items() if key != frozen]
        want = [x for key, x in zip(given, expected, strict=True) if key != frozen]
        assert_close(f"{name} without {frozen}", torch.autograd.grad(op(**some).sum(), left)[0], want[0], fp32(1e-6))
    with torch.no_grad():
        assert not op(**given).requires_grad
