"""Which tokens a context parallel rank holds."""

from __future__ import annotations

import pytest
import torch

from loongforge.core.megatron.context_parallel import local_indices, natural_order


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [(1,), (3, 1), (1, 4, 2)])
def test_ranks_share_every_token_and_order_restores_them(size: int, lengths: tuple[int, ...]) -> None:
    ends = torch.tensor([0, *lengths]).cumsum(0) * 2 * size
    boundaries = tuple(ends.tolist())
    parts = [local_indices(boundaries, rank, size) for rank in range(size)]
    assert len({part.numel() for part in parts}) == 1
    together = torch.cat(parts)
    assert torch.equal(together.sort().values, torch.arange(boundaries[-1]))
    assert torch.equal(together[natural_order(boundaries, size)], torch.arange(boundaries[-1]))


def test_each_rank_holds_an_early_and_a_late_chunk_of_every_segment() -> None:
    assert local_indices((0, 8, 12), 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert local_indices((0, 8, 12), 1, 2).tolist() == [2, 3, 4, 5, 9, 10]


def test_every_rank_attends_to_equally_many_pairs() -> None:
    pairs = [int((local_indices((0, 24), rank, 4) + 1).sum()) for rank in range(4)]
    assert len(set(pairs)) == 1


def test_a_segment_that_does_not_divide_is_refused() -> None:
    with pytest.raises(AssertionError, match="segment of 6 tokens does not divide into 4 chunks"):
        local_indices((0, 8, 14), 0, 2)
