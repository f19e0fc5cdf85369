"""How fla-core's kernels are called, against stand-ins that have its recorded parameters and compute by our references.

The real ones run in `interpreted/test_fla.py`, where fla-core is installed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from dsa_inputs import normal
from peers_recorded import FLA, stand_ins, truth
from torch import Tensor

from loongforge.kernels.peers import fla
from loongforge.kernels.registry import KernelError, Registry
from loongforge.kernels.testing import assert_matches

LABELS = torch.tensor([[3, -100, 0, 16], [1, 2, -100, 7]])
ENDS = (0, 3, 70, 71, 90)


def norm(given: dict[str, Any]) -> Tensor:
    assert given["bias"] is None
    return truth("rms_norm")(given["x"], given["weight"], given["eps"])


def turned(given: dict[str, Any]) -> Tensor:
    """x `[B, T, heads, D]` by cos `[T, R / 2]` of the same type."""
    x, cos, sin = (given[name] for name in ("x", "cos", "sin"))
    assert (cos.dtype, sin.dtype, len(cos), cos.ndim) == (x.dtype, x.dtype, x.shape[1], 2)
    return truth("rope")(x, cos[None, :, None], sin[None, :, None], given["interleaved"])


def entropy(given: dict[str, Any]) -> tuple[Tensor, None]:
    assert given.keys() == {"logits", "target", "ignore_index"}
    return truth("cross_entropy")(given["logits"], given["target"], given["ignore_index"]), None


def convolved(given: dict[str, Any]) -> tuple[Tensor, None]:
    assert given["activation"] == "silu"
    return truth("causal_convolution")(given["x"], given["weight"], _list(given["cu_seqlens"])), None


def ruled(given: dict[str, Any]) -> tuple[Tensor, None]:
    """q and k `[B, T, H, D]`, v `[B, T, HV, V]`, where value heads of one key head stand together."""
    assert given["use_qk_l2norm_in_kernel"]
    keys = given["q"].shape[2]
    values = (given[name].unflatten(2, (keys, -1)) for name in ("v", "g", "beta"))
    ruled = truth("gated_delta_rule")(given["q"], given["k"], *values, _list(given["cu_seqlens"]))
    return ruled.flatten(2, 3), None


def _list(ends: Tensor | None) -> list[int] | None:
    assert ends is None or ends.dtype == torch.int64
    return None if ends is None else ends.tolist()


@pytest.fixture(autouse=True)
def in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = {
        "rms_norm": norm,
        "swiglu": lambda given: truth("swiglu")(torch.cat((given["x"], given["y"]), dim=-1)),
        "rotary_embedding": turned,
        "cross_entropy_loss": entropy,
        "causal_conv1d": convolved,
        "chunk_gated_delta_rule": ruled,
    }
    monkeypatch.setattr(fla, "_of", stand_ins(FLA, compute))


def check(op: str, inputs: dict[str, Tensor], ratio: float = 4e-7, **named: Any) -> None:
    assert_matches(partial(getattr(fla, op), **named), partial(truth(op), **named), inputs, ratio)


def test_rms_norm_and_swiglu():
    check("rms_norm", {"x": normal(3, 4, 6, seed=1), "weight": normal(6, seed=2)}, eps=1e-3)
    check("swiglu", {"x": normal(3, 4, 10, seed=1)})


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_rope(batch, interleaved):
    angles = {"cos": normal(5, batch, 1, 3, seed=2, grad=False), "sin": normal(5, batch, 1, 3, seed=3, grad=False)}
    check("rope", {"x": normal(5, 2, 3, 8, seed=1), **angles}, interleaved=interleaved)
    narrow = normal(5, 2, 3, 8, seed=1, dtype=torch.bfloat16)
    check("rope", {"x": narrow, **angles}, 8e-3, interleaved=interleaved)


def test_what_fla_does_not_rotate_is_refused():
    x, angle = torch.zeros(5, 2, 3, 258), torch.zeros(5, 1, 1, 3)
    with pytest.raises(ValueError, match=r"D <= 256\] by .* not \(5, 2, 3, 258\) by \(5, 1, 1, 3\): take impl='eager'"):
        fla.rope(x, angle, angle)


def test_cross_entropy():
    check("cross_entropy", {"logits": normal(2, 4, 17, seed=1)}, labels=LABELS)


@pytest.mark.parametrize("ends", [None, ENDS], ids=["whole", "packed"])
def test_what_a_layer_with_the_gated_delta_rule_calls(ends):
    rows, length = (2, 20) if ends is None else (1, 90)
    check("causal_convolution", {"x": normal(rows, length, 6, seed=1), "weight": normal(6, 4, seed=2)}, ends=ends)
    heads = (rows, length, 2)
    inputs = {
        "q": normal(*heads, 4, seed=1),
        "k": normal(*heads, 4, seed=2),
        "v": normal(*heads, 3, 5, seed=3),
        "decay": (-normal(*heads, 3, seed=4, grad=False).exp()).requires_grad_(),
        "beta": normal(*heads, 3, seed=5, grad=False).sigmoid().requires_grad_(),
    }
    check("gated_delta_rule", inputs, 2e-6, ends=ends)  # measured 4e-7


def test_the_gated_delta_rule_takes_fla_where_it_runs(monkeypatch):
    monkeypatch.setattr("loongforge.kernels.registry._installed", lambda line: True)
    kernels = Registry.installed()
    for op in ("gated_delta_rule", "causal_convolution"):
        assert kernels.choose(op, "cuda", torch.bfloat16).call is getattr(fla, op)
        assert kernels.choose(op, "cuda", torch.float32).spec.impl == "reference"
        assert kernels.choose(op, "cpu", torch.bfloat16).spec.impl == "reference"


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr("loongforge.kernels.registry._installed", lambda line: "fla" not in line)
    kernels = Registry.installed()
    line = kernels.choose("gated_delta_rule", "cuda", torch.bfloat16).line()
    assert line == "gated_delta_rule: fla refused (needs pip install 'fla-core>=0.6,<0.7'); using reference"
    with pytest.raises(KernelError, match=r"rms_norm: nothing runs on cuda: fla refused \(needs pip install 'fla-core"):
        kernels.choose("rms_norm", "cuda", impl="fla")
