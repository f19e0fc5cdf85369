"""The shipped test tools catch what they are for."""

from __future__ import annotations

import pytest
import torch

from loongforge.kernels.testing import assert_close, error_ratio, poison


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
