"""Kernels of other projects: chosen by name alone, refused with a reason, and Liger's called as they were recorded.

The real ones run in `interpreted/test_liger.py`, where liger-kernel is installed. Here functions with the recorded
parameters stand in for them and compute by our references, so that a wrong order of arguments or of dimensions shows;
`test_peers_fla.py` and `test_peers_te.py` do the same for two more projects.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dsa_inputs import normal
from peers_recorded import LIGER, stand_in, truth
from torch import Tensor

from loongforge.kernels.peers import liger
from loongforge.kernels.registry import KernelError, Registry
from loongforge.kernels.testing import assert_matches

LABELS = torch.tensor([[3, -100, 0, 16], [1, 2, -100, 7]])
ROPE = {"cos": (5, 2, 1, 3), "sin": (5, 2, 1, 3)}
CASES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "rms_norm": ({"x": (3, 4, 6), "weight": (6,)}, {"eps": 1e-3}),
    "swiglu": ({"x": (3, 4, 10)}, {}),
    "rope": ({"x": (5, 2, 3, 8), **ROPE}, {}),
    "cross_entropy": ({"logits": (2, 4, 17)}, {"labels": LABELS}),
    "linear_cross_entropy": ({"hidden": (2, 4, 6), "weight": (17, 6)}, {"labels": LABELS}),
}


def norm(X: Tensor, W: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool) -> Tensor:
    assert (casting_mode, in_place) == ("gemma", False)  # rounded once; the incoming gradient stays
    return truth("rms_norm")(X, W + offset, eps)


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, sign: int) -> tuple[Tensor, Tensor]:
    """q `[B, heads, S, D]` in memory `[B, S, heads, D]`, cos `[B, S, R / 2]`."""
    assert q.transpose(1, 2).is_contiguous()
    assert rotary_dim == 2 * cos.shape[-1]
    wide = (part[:, None] for part in (cos, sign * sin))
    return truth("rope")(q, *wide), k


def loss(logits: Tensor, target: Tensor, weight: None, ignore_index: int, smoothing: tuple[float, ...]) -> Tensor:
    assert weight is None
    assert smoothing == (0.0, 0.0)
    return truth("cross_entropy")(logits, target, ignore_index)


def entropy(inputs: dict[str, Any], given: list[Tensor]) -> tuple[Tensor, None]:
    assert inputs["reduction"] == "none"
    logits = inputs["_input"]
    assert logits.data_ptr() not in [x.data_ptr() for x in given], "Liger leaves the gradient in the logits"
    smoothing = inputs["lse_square_scale"], inputs["label_smoothing"]
    return loss(logits, inputs["target"], inputs["weight"], inputs["ignore_index"], smoothing), None


def linear_entropy(inputs: dict[str, Any]) -> tuple[Tensor, None]:
    assert (inputs["reduction"], inputs["accum_dtype"], inputs["bias"]) == ("none", torch.float32, None)
    assert not inputs["return_z_loss"]
    assert inputs["softcap"] is None
    logits = inputs["_input"] @ inputs["weight"].t()
    smoothing = inputs["lse_square_scale"], inputs["label_smoothing"]
    return loss(logits, inputs["target"], inputs["ce_weight"], inputs["ignore_index"], smoothing), None


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Puts them in Liger's place. Returns the list to which a test adds tensors that are not to be written to."""
    given: list[Tensor] = []
    compute: dict[str, Callable[[dict[str, Any]], Any]] = {
        "LigerRMSNormFunction": lambda x: norm(**x),
        "LigerFusedGateUpSiLUMulFunction": lambda x: truth("swiglu")(x["y"]),
        "LigerCrossEntropyFunction": lambda x: entropy(x, given),
        "LigerFusedLinearCrossEntropyFunction": linear_entropy,
        "rope_forward": lambda x: turned(**x, sign=1),
        "rope_backward": lambda x: turned(x["dq"], x["dk"], x["cos"], x["sin"], x["rotary_dim"], -1),
    }

    def module(op: str) -> SimpleNamespace:
        found = {name: stand_in(names, compute[name]) for (place, name), names in LIGER.items() if place == op}
        return SimpleNamespace(
            **{name: SimpleNamespace(apply=one) if name.startswith("Liger") else one for name, one in found.items()}
        )

    monkeypatch.setattr(liger, "_of", module)
    return given


@pytest.mark.parametrize("op", CASES)
def test_liger_is_called_as_it_was_recorded(op, stand_ins):
    shapes, named = CASES[op]
    inputs = {
        name: normal(*shape, seed=number, grad=name not in ROPE) for number, (name, shape) in enumerate(shapes.items())
    }
    stand_ins += inputs.values()
    assert_matches(partial(getattr(liger, op), **named), partial(truth(op), **named), inputs, 4e-7)


def test_what_liger_does_not_rotate_is_refused():
    x, angle = torch.zeros(5, 2, 3, 8), torch.zeros(5, 1, 1, 3)
    with pytest.raises(
        ValueError, match=r"rope: liger rotates halves of x \[S, B, heads, D\] by .* not pairs: take impl="
    ):
        liger.rope(x, angle, angle, interleaved=True)
    with pytest.raises(ValueError, match=r"not \(2, 3, 8\) by \(5, 1, 1, 3\): take impl='eager'"):
        liger.rope(x[0], angle, angle)


@pytest.mark.parametrize("op", [*CASES, "adamw"])
def test_a_peer_is_never_chosen_unasked(op):
    peers, ours = set(), set()
    for offer in Registry.installed().offers(op):
        (peers if offer.spec.impl in ("liger", "fla", "te") else ours).add(offer.spec.priority)
    assert peers
    assert max(peers) < min(ours)


def test_a_peer_that_cannot_run_is_refused_with_its_reason(monkeypatch):
    kernels = Registry.installed()
    with pytest.raises(KernelError, match=r"rms_norm: nothing runs on cpu: liger refused \(needs cuda, have cpu\)"):
        kernels.choose("rms_norm", "cpu", impl="liger")
    monkeypatch.setattr("loongforge.kernels.registry._installed", lambda line: "liger" not in line)
    with pytest.raises(KernelError, match=r"liger refused \(needs pip install 'liger-kernel>=0.8.5,<0.9'\)"):
        kernels.choose("rms_norm", "cuda", impl="liger")
