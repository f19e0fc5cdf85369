"""The loss of a vocabulary that ranks share against that of the whole, over two and four processes."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import processes
import pytest
import torch
import torch.distributed as dist
from dsa_inputs import normal
from torch import Tensor

from loongforge.kernels.linear_cross_entropy import linear_cross_entropy
from loongforge.kernels.linear_cross_entropy.reference import linear_cross_entropy as truth
from loongforge.kernels.testing import assert_close

TOKENS, WIDTH, VOCAB = 37, 10, 53
RATIO = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2}
"""Measured 2.3e-7 and 1.1e-2; bf16 rounds logits before the loss, and shares of hidden's gradient before their sum."""
SIZES = {2: (27, 26), 4: (14, 14, 14, 11)}
"""Rows of each rank: the last has fewer, as where padding is cut off."""

BLOCKS = 4 * 14 * 18
"""Bytes of logits for 18 tokens of 14 rows, but 22 of 11: by itself each rank would work on other blocks."""


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels[1::5] = -100
    return {
        "hidden": normal(TOKENS, WIDTH, seed=1, dtype=dtype, grad=False) * 3,
        "weight": normal(VOCAB, WIDTH, seed=2, dtype=dtype, grad=False),
        "labels": labels,
        "mask": (torch.arange(TOKENS) % 3 != 1).float(),
        "surprise": normal(TOKENS, seed=4, grad=False),
    }


def gradients(op: Any, given: dict[str, Any], grad: Tensor, rows: slice = slice(None), **named: Any) -> list[Tensor]:
    """Loss, and gradients of hidden and of some rows of weight."""
    hidden, weight = (x.clone().requires_grad_() for x in (given["hidden"], given["weight"][rows]))
    loss = op(hidden, weight, given["labels"], **named)
    return [loss, *torch.autograd.grad(loss, (hidden, weight), grad.to(loss.dtype))]


def compare(op: Any, given: dict[str, Any], group: dist.ProcessGroup, case: str) -> None:
    """One case on the rows of this rank."""
    sizes, place = SIZES[group.size()], group.rank()
    rows = slice(sum(sizes[:place]), sum(sizes[: place + 1]))
    grad = given["surprise"] if case in ("surprise", "blocks") else given["mask"] / given["mask"].sum()
    wide = given | {name: given[name].double() for name in ("hidden", "weight")}
    want = gradients(truth, wide, grad)
    want[2] = want[2][rows]
    promise = {"token_weight": given["mask"], "proportional": True, "tp_rows": sizes, "sum_hidden": False}
    named = {"mask": {"token_weight": given["mask"]}, "surprise": {}, "blocks": {"block_bytes": BLOCKS}}.get(
        case, promise
    )
    have, again = (gradients(op, given, grad, rows, tp_group=group, **named) for _ in range(2))
    plain = gradients(truth, wide, grad, rows, tp_group=group, sum_hidden=case != "promise")
    if case == "promise":
        for share in (have[1], again[1], plain[1]):
            dist.all_reduce(share, group=group)
    for name, *found in zip(("loss", "hidden", "weight"), want, have, again, plain, strict=True):
        assert_close(f"{name}, {case}", found[1], found[0], RATIO[given["hidden"].dtype])
        assert torch.equal(found[1], found[2]), f"{name}, {case}: another result in a second run"
        assert_close(f"{name}, {case}: reference", found[3], found[0], 1e-14)
    for mine in have[:2]:
        everywhere = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(everywhere, mine.detach(), group=group)
        assert all(torch.equal(mine, other) for other in everywhere), f"{case}: ranks differ"


def every_case(rank: int, op: Any = linear_cross_entropy) -> None:
    """In groups of two ranks, and of all four."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    everyone = dist.new_group()
    for group in (pair, everyone):
        for dtype in RATIO:
            for case in ("mask", "surprise", "blocks", "promise"):
                compare(op, inputs(dtype), group, case)
    given = inputs(torch.float32)
    labels = given["labels"].index_fill(0, torch.tensor([2]), VOCAB)  # beyond the vocabulary
    rows = slice(14 * rank, 14 * rank + SIZES[4][rank])
    loss = op(given["hidden"], given["weight"][rows], labels, tp_group=everyone)
    assert loss.isnan().nonzero().flatten().tolist() == [2]


def test_loss_and_gradients_are_those_of_the_whole_vocabulary():
    processes.run(every_case, 4)


def test_liger_takes_a_whole_vocabulary():
    from loongforge.kernels.peers import liger

    given, group = inputs(torch.float32), Mock()
    with pytest.raises(ValueError, match="liger takes a whole vocabulary, no tp_group: take impl='eager'"):
        liger.linear_cross_entropy(given["hidden"], given["weight"], given["labels"], tp_group=group)
