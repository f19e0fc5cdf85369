"""The kernels of cross entropy through Triton's interpreter against fp64: whole rows, blocks, and ranks that share."""

from __future__ import annotations

import math
from functools import partial

import processes
import pytest
import test_vocab_parallel
import torch
import torch.distributed as dist
from device import ON_GPU, fp32
from dsa_inputs import normal

from loongforge.kernels.cross_entropy import triton as rows
from loongforge.kernels.cross_entropy.reference import cross_entropy as cross_entropy_truth
from loongforge.kernels.cross_entropy.triton import cross_entropy
from loongforge.kernels.linear_cross_entropy.reference import linear_cross_entropy as truth
from loongforge.kernels.linear_cross_entropy.triton import linear_cross_entropy
from loongforge.kernels.testing import assert_matches

RATIO = {torch.float32: fp32(4e-7), torch.bfloat16: 8e-3}
"""Measured 1.6e-7 and 2.9e-3 at most."""
DTYPES = pytest.mark.parametrize("dtype", RATIO, ids=str)


def labels(tokens: int, vocab: int) -> torch.Tensor:
    chosen = torch.randint(vocab, (tokens,), generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    chosen[1::5] = -100
    return chosen.to(torch.get_default_device())


@DTYPES
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 2), (7, 1), (5, 128), (4, 1037)], ids=str)
def test_cross_entropy(tokens, vocab, dtype, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 256)
    logits = (normal(tokens, vocab, seed=1, grad=False) * 3).to(dtype).requires_grad_()
    given = {"labels": labels(tokens, vocab)}
    assert_matches(
        partial(cross_entropy, **given), partial(cross_entropy_truth, **given), {"logits": logits}, RATIO[dtype]
    )


def test_rows_with_strides_and_a_label_that_is_no_column():
    wide = normal(3, 2, 40, seed=1, grad=False)
    logits = wide[:, 1, :37].requires_grad_()
    given = {"labels": torch.tensor([0, 36, 5])}
    assert_matches(
        partial(cross_entropy, **given), partial(cross_entropy_truth, **given), {"logits": logits}, RATIO[torch.float32]
    )
    assert cross_entropy(logits, torch.tensor([37, 0, -1])).isnan().tolist() == [True, False, True]
    assert cross_entropy(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_where_the_model_is_sure_every_digit_stays():
    """At a margin of 40, 1 - p is 1e-17: fp32 has no such number near 1, and fp64 does not either."""
    logits = torch.zeros(3, 4)
    logits[0, 1], logits[1, 1], logits[2, 0] = 40.0, 7.0, -math.inf
    logits.requires_grad_()
    loss = cross_entropy(logits, torch.tensor([1, 1, 2]))
    loss.sum().backward()
    small = 3 * math.exp(-40)
    assert loss[0].item() == pytest.approx(small, rel=1e-6)
    assert logits.grad[0, 1].item() == pytest.approx(-small, rel=1e-6)
    assert loss[1].item() == pytest.approx(math.log1p(3 * math.exp(-7)), rel=1e-6)
    assert loss[2].item() == pytest.approx(math.log(3), rel=1e-6)
    assert logits.grad[2, 0].item() == 0


@DTYPES
@pytest.mark.parametrize(("weighted", "block_bytes"), [("mask", None), ("promise", 1), ("surprise", 1)], ids=str)
def test_linear_cross_entropy(block_bytes, weighted, dtype, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 256)
    tokens, vocab = 37, 307
    mask = (torch.arange(tokens) % 3 != 1).float()
    given = {"labels": labels(tokens, vocab), "token_weight": None if weighted == "surprise" else mask}
    factor = mask if weighted != "surprise" else torch.ones(tokens)
    promised = {"block_bytes": block_bytes, "proportional": weighted == "promise"}
    inputs = {"hidden": normal(tokens, 24, seed=1, dtype=dtype), "weight": normal(vocab, 24, seed=2, dtype=dtype)}

    def weighed(op, **x):
        loss = op(**x, **given)
        # a sum has one gradient: 0.37 times the factor for every token
        return (loss * factor).sum() if weighted != "surprise" else loss

    # bf16 logits are rounded once before the loss, and their gradient once: measured 5.2e-3 at most
    ratio = {torch.float32: fp32(1e-6), torch.bfloat16: 1.2e-2}[dtype]
    assert_matches(partial(weighed, partial(linear_cross_entropy, **promised)), partial(weighed, truth), inputs, ratio)


def shared(rank: int) -> None:
    """Two of the cases that `test_vocab_parallel.py` names, on some tokens."""
    for dtype, case in ((torch.float32, "surprise"), (torch.bfloat16, "promise")):
        given = {name: x if name == "weight" else x[:12] for name, x in test_vocab_parallel.inputs(dtype).items()}
        test_vocab_parallel.compare(linear_cross_entropy, given, dist.group.WORLD, case)


@pytest.mark.skipif(ON_GPU, reason="its processes are forked, and exchange through gloo")
def test_ranks_that_share_a_vocabulary():
    processes.run(shared, 2)
