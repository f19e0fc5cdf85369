"""The shipped test tools catch what they are for."""

from __future__ import annotations

import pytest
import torch

from loongforge.kernels.testing import ZOO, Rows, assert_close, assert_matches, error_ratio, poison


def test_poison_shows_unwritten_memory_and_goes_away():
    with poison():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
        assert (torch.empty(2, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert torch.empty.__module__ != "loongforge.kernels.testing"


def test_assert_close_fails_on_a_difference_a_shape_and_nan():
    x = torch.ones(4)
    assert assert_close("x", x, x, 0.0) == 0.0
    assert error_ratio(x * 1.5, x) == pytest.approx(0.5)
    with pytest.raises(AssertionError, match=r"x: error ratio 0.5, at most 0.1 allowed"):
        assert_close("x", x * 1.5, x, 0.1)
    with pytest.raises(AssertionError, match=r"shape \(4,\), expected \(2, 2\)"):
        assert_close("x", x, torch.ones(2, 2), 0.1)
    with pytest.raises(AssertionError, match="error ratio nan"):
        assert_close("x", x * float("nan"), x, 1e9)


def test_infinities_are_compared_by_place_and_sign():
    x = torch.tensor([1.0, float("-inf"), 2.0])
    assert assert_close("x", x, x.double(), 0.0) == 0.0
    with pytest.raises(AssertionError, match="infinities elsewhere"):
        assert_close("x", torch.tensor([1.0, 0.0, 2.0]), x, 1e9)
    with pytest.raises(AssertionError, match="other sign"):
        assert_close("x", -x, x, 1e9)


def test_assert_matches_sees_a_wrong_output_a_wrong_gradient_and_unwritten_memory():
    inputs = {"x": torch.randn(3, 4, requires_grad=True), "index": torch.tensor([2, 0])}

    def truth(x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[index].exp(), x.sum(1)

    assert set(assert_matches(truth, truth, inputs, 1e-6)) == {"output 0", "output 1", "x"}
    with pytest.raises(AssertionError, match="output 1"):
        assert_matches(lambda x, index: (x[index].exp(), x.mean(1)), truth, inputs, 1e-6)
    with pytest.raises(AssertionError, match="gradient of x"):
        assert_matches(lambda x, index: (x[index].exp(), x.sum(1) + 0 * x.detach()[:, 0] - x[:, 0] + x.detach()[:, 0]),
                       truth, inputs, 1e-6)  # fmt: skip
    with pytest.raises(AssertionError, match="output 0: error ratio nan"):
        assert_matches(lambda x, index: (torch.empty(2, 4) + 0 * x[:2], x.sum(1)), truth, inputs, 1e-6)


@pytest.mark.parametrize("rows", ZOO, ids=lambda rows: rows.name)
def test_a_selection_lies_within_what_each_query_sees(rows: Rows):
    ks, ke = rows.bounds()
    for holes in (False, True):
        chosen = rows.indices(holes=holes)
        inside = (chosen >= ks[:, None]) & (chosen < ke[:, None])
        assert torch.equal(inside.sum(1), (ke - ks).clamp(max=rows.topk).long())
        assert torch.equal(inside, (chosen >= 0) & (chosen < rows.keys))
        for row in range(len(ks)):
            assert len(set(chosen[row, inside[row]].tolist())) == inside[row].sum()


def test_bounds_of_packed_documents():
    ks, ke = Rows(name="two", documents=(2, 3), topk=1, queries=(4, -1, 1)).bounds()
    assert (ks.tolist(), ke.tolist()) == ([2, 0, 0], [5, 0, 2])
