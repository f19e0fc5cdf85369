"""What tests of kernels need; shipped, so that another wheel's kernels are tested the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
    """Fail unless `error_ratio` is at most `ratio`; shapes must agree and nothing may be NaN. Returns the ratio.

    Infinities must stand in the same places with the same sign; the ratio is that of the other numbers.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    infinite = expected.isinf()
    if infinite.any():
        assert torch.equal(actual.isinf(), infinite), f"{name}: infinities elsewhere than expected"
        assert torch.equal(actual[infinite] > 0, expected[infinite] > 0), f"{name}: an infinity of the other sign"
        actual, expected = actual[~infinite], expected[~infinite]
    have = error_ratio(actual, expected)
    assert have <= ratio, f"{name}: error ratio {have:.3g}, at most {ratio:.3g} allowed"  # false for NaN too
    return have


def assert_matches(
    op: Callable[..., Any], truth: Callable[..., Any], inputs: Mapping[str, Tensor], ratio: float, seed: int = 0
) -> dict[str, float]:
    """Compare outputs and gradients of `op` with those of `truth` on the same numbers in fp64.

    Both take `inputs` by name and return a tensor or a tuple of them; integer inputs are handed on as they are. `op`
    runs with poisoned memory. Each floating output gets a random gradient in its own dtype. Returns the error ratio of
    every output and of the gradient of every input that requires one, by name.
    """
    wide = {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    leaves = [name for name, x in inputs.items() if x.requires_grad]
    expected = _tuple(truth(**wide))
    with poison():
        found = _tuple(op(**inputs))
    assert len(found) == len(expected), f"{len(found)} outputs, expected {len(expected)}"
    ratios = {
        f"output {number}": assert_close(f"output {number}", have, want, ratio)
        for number, (have, want) in enumerate(zip(found, expected, strict=True))
    }
    if not leaves:
        return ratios
    generator = torch.Generator().manual_seed(seed)
    outputs = [(have, want) for have, want in zip(found, expected, strict=True) if want.requires_grad]
    grads = [torch.randn(have.shape, generator=generator, device="cpu").to(have) for have, _ in outputs]
    with poison():
        mine = torch.autograd.grad([have for have, _ in outputs], [inputs[name] for name in leaves], grads)
    right = torch.autograd.grad(
        [want for _, want in outputs], [wide[name] for name in leaves], [grad.double() for grad in grads]
    )
    for name, have, want in zip(leaves, mine, right, strict=True):
        assert have.dtype == inputs[name].dtype, f"gradient of {name}: {have.dtype}, expected {inputs[name].dtype}"
        ratios[name] = assert_close(f"gradient of {name}", have, want, ratio)
    return ratios


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Queries over packed documents, for ops that know bounds and selections of keys: one shape of the zoo."""

    name: str
    documents: tuple[int, ...]
    """Length of each document; keys stand one document after the other."""
    topk: int
    """Columns of a selection."""
    queries: tuple[int, ...] | None = None
    """Key row of each query, -1 for a query that sees nothing; every key row in order when None."""

    @property
    def keys(self) -> int:
        """Number of keys."""
        return sum(self.documents)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """First key each query sees and one past the last, int32 `[T]`: its document's, up to itself."""
        starts = [sum(self.documents[:n]) for n, length in enumerate(self.documents) for _ in range(length)]
        rows = range(self.keys) if self.queries is None else self.queries
        pairs = [(starts[row], row + 1) if row >= 0 else (0, 0) for row in rows]
        ks, ke = torch.tensor(pairs, dtype=torch.int32).unbind(1)
        return ks.contiguous(), ke.contiguous()

    def indices(self, seed: int = 0, holes: bool = False) -> Tensor:
        """A random selection, int32 `[T, topk]`: ascending keys and -1 behind them.

        With `holes` the order is random and what is not a key is -1, or any other number outside `[0, keys)`.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.device("cpu"):  # the same numbers on every device
            selected = torch.full((len(self.bounds()[0]), self.topk), -1, dtype=torch.int32)
            for row, (start, end) in enumerate(zip(*(bound.tolist() for bound in self.bounds()), strict=True)):
                chosen = start + torch.randperm(end - start, generator=generator)[: self.topk].int()
                if holes:
                    selected[row] = torch.tensor([-1, -7, self.keys, self.keys + 3]).repeat(self.topk)[: self.topk]
                    selected[row, torch.randperm(self.topk, generator=generator)[: len(chosen)]] = chosen
                else:
                    selected[row, : len(chosen)] = chosen.sort().values
        return selected.to(torch.get_default_device())


ZOO: tuple[Rows, ...] = (
    Rows(name="one token", documents=(1,), topk=1),
    Rows(name="odd", documents=(37,), topk=5),
    Rows(name="top-k beyond the row", documents=(9,), topk=19),
    Rows(name="packed", documents=(5, 1, 11, 2), topk=4),
    Rows(name="context parallel", documents=(12, 22), topk=8, queries=(*range(8), *range(26, 34))),
    Rows(name="rows that see nothing", documents=(7, 6), topk=3, queries=(-1, 2, 6, -1, 12, 7, -1)),
)
"""Shapes small enough for Triton's interpreter, each odd in its own way."""


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
