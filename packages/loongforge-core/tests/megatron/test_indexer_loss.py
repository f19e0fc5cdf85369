"""The loss of an indexer's warm-up: made a few queries at a time, it and its gradients are the plain formula's."""

from __future__ import annotations

import torch

from loongforge.core.megatron.indexer_loss import Scored, every_key_loss, key_shares
from loongforge.kernels.row_bounds import row_bounds


def test_the_loss_over_every_key_is_the_plain_formula() -> None:
    """Two packed documents, fp64; 11 rows of 4 at a time."""
    torch.manual_seed(3)
    ks, ke = row_bounds(torch.tensor([0, 7, 11]))
    shapes = {"query": (11, 3, 5), "key": (11, 5), "weights": (11, 3)}
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values()]
    attending, attended = torch.randn(11, 2, 6, dtype=torch.float64), torch.randn(11, 2, 6, dtype=torch.float64)
    place = torch.arange(11)
    unseen = (place < ks[:, None]) | (place >= ke[:, None])
    scores = torch.einsum("tnd,snd->tns", attending, attended) * 0.3
    lse = scores.masked_fill(unseen[:, None], float("-inf")).logsumexp(-1)
    asked: list[int] = []

    def shares(part: slice) -> torch.Tensor:
        asked.append(len(attending[part]))
        return key_shares(attending[part], attended, lse[part], ks[part], ke[part], scale=0.3)

    found = every_key_loss(Scored(*leaves), ks, ke, shares, 4)
    gradients = torch.autograd.grad(2.5 * found, leaves)
    assert asked == [4, 4, 3]

    query, key, weights = leaves
    logits = torch.einsum("tie,se->tis", query, key).relu().mul(weights[..., None]).sum(1)
    logs = logits.masked_fill(unseen, float("-inf")).log_softmax(-1)
    target = scores.masked_fill(unseen[:, None], float("-inf")).softmax(-1).mean(1)
    expected = sum(
        (target[t, s] * (target[t, s].log() - logs[t, s]) for t, s in (~unseen).nonzero()), torch.tensor(0.0)
    )
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(gradients, torch.autograd.grad(2.5 * expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)
