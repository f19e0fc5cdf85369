"""How TransformerEngine's kernels are called, against stand-ins that have its recorded parameters.

They compute by our references. Its Triton kernel runs in `interpreted/test_te.py`; those in CUDA need a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from dsa_inputs import normal
from peers_recorded import TE, stand_ins, truth
from torch import Tensor

from loongforge.kernels.adamw.reference import adamw as adamw_truth
from loongforge.kernels.peers import te
from loongforge.kernels.registry import KernelError, Registry
from loongforge.kernels.testing import assert_matches

LABELS = torch.tensor([[3, -100, 0, 16], [1, 2, -100, 7]])
KINDS = {torch.float32: "float 32", torch.bfloat16: "brain float 16"}


def backward(op: str, grad: Tensor, *inputs: Tensor, **named: Any) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(truth(op)(*leaves, **named), leaves, grad)


def norm(given: dict[str, Any]) -> tuple[Tensor, None, Tensor]:
    """y, and what the backward pass asks for."""
    x, weight, eps = given["input"], given["weight"], given["eps"]
    assert (x.ndim, x.dtype, KINDS[x.dtype]) == (2, weight.dtype, given["otype"])
    assert x.is_contiguous()
    assert (given["ln_out"], given["quantizer"], given["sm_margin"]) == (None, None, 0)
    assert given["zero_centered_gamma"] is False
    return truth("rms_norm")(x, weight, eps), None, torch.rsqrt(x.float().square().mean(-1) + eps)


def norm_backward(given: dict[str, Any]) -> tuple[Tensor, ...]:
    x, scale = given["x"], given["rsigma"]
    assert (given["sm_margin"], given["zero_centered_gamma"]) == (0, False)
    assert given["dz"].is_contiguous()
    eps = (scale.double() ** -2 - x.double().square().mean(-1)).mean().item()
    return backward("rms_norm", given["dz"], x, given["gamma"], eps=eps)


def gated(given: dict[str, Any]) -> Tensor:
    assert given["quantizer"] is None
    return truth("swiglu")(given["input"])


def gated_backward(given: dict[str, Any]) -> Tensor:
    assert given["quantizer"] is None
    assert given["grad"].is_contiguous()
    return backward("swiglu", given["grad"], given["fwd_input"])[0]


def entropy(given: dict[str, Any]) -> Tensor:
    assert given.keys() == {"inp", "target", "ignore_idx"}
    assert given["inp"].ndim == 3
    return truth("cross_entropy")(given["inp"], given["target"], given["ignore_idx"])


def apply(op: Any, noop_flag_buffer: Tensor, tensor_lists: list[list[Tensor]], *arguments: Any) -> None:
    """As `MultiTensorApply.__call__`."""
    op(2048 * 32, noop_flag_buffer, tensor_lists, *arguments)


def stepped(given: dict[str, Any]) -> None:
    assert (given["noop_flag"].dtype, given["noop_flag"].tolist()) == (torch.int32, [0])
    assert (given["mode"], given["bias_correction"]) == (1, 1)
    gradients, parameters, first, second = given["tensor_lists"]
    adamw_truth(
        parameters, gradients, first, second, step=given["step"], lr=given["lr"], eps=given["epsilon"],
        betas=(given["beta1"], given["beta2"]), weight_decay=given["weight_decay"],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = {
        "rmsnorm_fwd": norm,
        "rmsnorm_bwd": norm_backward,
        "swiglu": gated,
        "dswiglu": gated_backward,
        "parallel_cross_entropy": entropy,
        "multi_tensor_adam": stepped,
    }
    functions, others = stand_ins(TE, compute), {"TE_DType": KINDS, "multi_tensor_applier": apply}
    monkeypatch.setattr(te, "_of", lambda module, name: others.get(name) or functions(module, name))


def check(op: str, inputs: dict[str, Tensor], ratio: float = 4e-7, **named: Any) -> None:
    assert_matches(partial(getattr(te, op), **named), partial(truth(op), **named), inputs, ratio)


def test_rms_norm():
    check("rms_norm", {"x": normal(3, 4, 6, seed=1), "weight": normal(6, seed=2)}, 2e-6, eps=1e-3)
    x = normal(4, 3, 6, seed=1, dtype=torch.bfloat16, grad=False).transpose(0, 1).requires_grad_()
    check("rms_norm", {"x": x, "weight": normal(6, seed=2)}, 8e-3, eps=1e-3)  # a wide weight


def test_swiglu():
    check("swiglu", {"x": normal(3, 4, 10, seed=1)})


def test_cross_entropy():
    check("cross_entropy", {"logits": normal(2, 4, 17, seed=1)}, labels=LABELS)


def test_adamw():
    def tensors(kind: int) -> list[Tensor]:
        return [normal(3, 4, seed=kind, grad=False).abs(), normal(5, seed=kind + 10, grad=False).abs()]

    options = {"step": 3, "lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}
    mine, right = ([tensors(kind) for kind in range(4)] for _ in range(2))
    te.adamw(*mine, **options)
    adamw_truth(*right, **options)
    for have, want in zip(mine, right, strict=True):
        assert all(map(torch.equal, have, want))
    te.adamw([], [], [], [], step=1, lr=1.0)


def test_what_it_does_not_take_is_refused(monkeypatch):
    monkeypatch.setattr("loongforge.kernels.registry._installed", lambda line: "transformer-engine" not in line)
    kernels = Registry.installed()
    with pytest.raises(KernelError, match=r"needs pip install 'transformer-engine\[pytorch\]>=2.18,<3'"):
        kernels.choose("cross_entropy", "cuda", impl="te")
    with pytest.raises(KernelError, match=r"te refused \(takes float32, not bfloat16\)"):
        kernels.choose("adamw", "cuda", torch.bfloat16, impl="te")
