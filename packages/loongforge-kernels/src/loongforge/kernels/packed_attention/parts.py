"""How a row divides into parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from loongforge.kernels.sending import sent


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """Lengths on the host, for loops, and ends on the device, for kernels: nothing waits for the device."""

    queries: tuple[int, ...]
    """Rows of query of each part, at least 1."""
    keys: tuple[int, ...]
    """Rows of key of each part, at least as many as of query."""
    query_ends: Tensor
    """int32 `[parts + 1]`, from 0 on."""
    key_ends: Tensor
    """int32 `[parts + 1]`, from 0 on."""

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Parts:
        """Raises ValueError for a part without queries or with fewer keys than queries."""
        if len(queries) != len(keys) or any(not 0 < q <= k for q, k in zip(queries, keys, strict=False)):
            raise ValueError(f"parts of {list(queries)} queries and {list(keys)} keys: each has 0 < queries <= keys")
        ends = _ends(queries, device)
        same = list(queries) == list(keys)
        return cls(
            queries=tuple(queries), keys=tuple(keys), query_ends=ends, key_ends=ends if same else _ends(keys, device)
        )

    def each(
        self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """`attend` for one part after another; it takes and gives a batch of one, `[1, heads, rows, D]`."""
        rows = (query.split(self.queries), key.split(self.keys), value.split(self.keys))
        outputs = [
            attend(*(tensor.transpose(0, 1)[None] for tensor in part))[0].transpose(0, 1)
            for part in zip(*rows, strict=True)
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    return sent(torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32), device)
