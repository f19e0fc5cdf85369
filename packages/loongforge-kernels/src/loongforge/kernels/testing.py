"""What tests of kernels need; shipped, so that another wheel's kernels are tested the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """norm(actual - expected) / norm(expected), in fp64; 0 when both are zero or empty."""
    truth = expected.detach().double()
    difference = (actual.detach().double() - truth).norm().item()
    return difference / max(truth.norm().item(), torch.finfo(torch.float64).tiny) if difference else 0.0


def assert_close(name: str, actual: Tensor, expected: Tensor, ratio: float) -> float:
    """Fail unless `error_ratio` is at most `ratio`; shapes must agree and nothing may be NaN. Returns the ratio."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    have = error_ratio(actual, expected)
    assert have <= ratio, f"{name}: error ratio {have:.3g}, at most {ratio:.3g} allowed"  # false for NaN too
    return have


@contextmanager
def poison() -> Iterator[None]:
    """Fill what torch.empty and its relatives return with NaN (integers: the largest), to show unwritten memory."""
    with ExitStack() as patched:
        for name in _EMPTY:
            patched.enter_context(mock.patch.object(torch, name, _filled(getattr(torch, name))))
        yield


_EMPTY = ("empty", "empty_like", "empty_strided")


def _filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **named: Any) -> Tensor:
        tensor = make(*args, **named)
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.iinfo(tensor.dtype).max)

    return call
