"""The adapters of one linear layer, computed beside it and spread over ranks as it is.

Every adapter of a linear has its own A `[r, inputs]` and B `[outputs, r]`; all of them are two multiplications: by the
As on top of each other, then by the Bs side by side, their rows in the order of the linear's fused matrix.

Where the linear's outputs are split, so are the rows of B, and what goes between ranks is the low-rank product
`[S, B, r]`, not the input. Where its inputs are split, so are the columns of A, and the low-rank product is summed
before B. The rest is whole on every rank, and so must be its gradient.

Shapes: S tokens (this rank's part under sequence parallelism), B batch, R the sum of the ranks of a linear's adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from loongforge.core.lora.targets import Adapter
from loongforge.core.megatron.layers import model_parallel_random
from loongforge.core.model.pieces import Shard, pieces
from loongforge.core.model.weights import Copy, SplitQKV


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How the linear is spread over ranks."""

    group: Any
    """Ranks that share its matrix."""
    sequence: bool
    """Whether they hold different tokens: sequence parallelism."""
    expert: int | None
    """Number of the expert whose it is: the dispatcher brings the tokens and adds up what the ranks make of them."""


class LowRank(torch.nn.Module):
    """All adapters of one linear on this rank."""

    def __init__(self, adapters: Sequence[Adapter], weight: torch.Tensor, spread: Spread, seed: int) -> None:
        """`weight` is the linear's matrix on this rank, `[outputs, inputs]`."""
        super().__init__()
        self.adapters, self.spread = tuple(adapters), spread
        self.split = self.adapters[0].matrix.split
        self.axes: dict[str, int] = {}
        for one in self.adapters:
            for side, made in (("A", self._inputs_of(one, weight, seed)), ("B", self._outputs_of(one, weight))):
                self._register(f"{one.matrix.leaf}_{side}", made, weight)
        self.order: torch.Tensor | None
        self.register_buffer("order", self._rows_in_order(weight), persistent=False)

    def _inputs_of(self, one: Adapter, weight: torch.Tensor, seed: int) -> torch.Tensor:
        """A as PEFT begins with it, uniform within 1 / sqrt(inputs); the same numbers in every layout."""
        whole = torch.empty(one.rank, one.matrix.inputs)
        name = hashlib.sha256(f"{seed} {one.matrix.name(self.spread.expert or 0)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(name[:8], "little") >> 1)
        whole.uniform_(-(one.matrix.inputs**-0.5), one.matrix.inputs**-0.5, generator=generator)
        if self.split == "columns":
            whole = whole.tensor_split(self.spread.group.size(), dim=1)[self.spread.group.rank()]
        assert whole.size(1) == weight.size(1), f"{one.matrix.module} has {weight.size(1)} inputs, not {whole.size(1)}"
        return whole

    def _outputs_of(self, one: Adapter, weight: torch.Tensor) -> torch.Tensor:
        """B, zero: the model begins as it was."""
        parts = self.spread.group.size() if self.split == "rows" else 1
        return torch.zeros(one.matrix.outputs // parts, one.rank)

    def _register(self, name: str, made: torch.Tensor, weight: torch.Tensor) -> None:
        parameter: Any = torch.nn.Parameter(made.contiguous().to(device=weight.device, dtype=weight.dtype))
        axis = {("rows", "B"): 0, ("columns", "A"): 1}.get((self.split, name[-1]))
        if axis is not None:
            set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            self.axes[name] = axis
        elif self.spread.expert is None:
            # Tells megatron-core to sum its gradient over tensor parallel ranks: each has seen its own tokens.
            parameter.sequence_parallel = self.spread.sequence
        parameter.allreduce = getattr(weight, "allreduce", True)
        self.register_parameter(name, parameter)

    def _rows_in_order(self, weight: torch.Tensor) -> torch.Tensor | None:
        """For every row of the fused matrix its row among the Bs on top of each other, the last one being zero.

        None when they stand like that already.
        """
        group, rule = self.spread.group, self.adapters[0].matrix.rule
        if isinstance(rule, Copy | SplitQKV):
            return None  # one module
        shard = Shard(rank=group.rank(), size=group.size(), vocab_size=0)
        blocks: dict[str, list[Any]] = {}
        for piece in pieces(rule, tuple(weight.shape), shard):
            blocks.setdefault(piece.hf, []).append(piece)
        rows = [self.get_parameter(f"{one.matrix.leaf}_B").size(0) for one in self.adapters]
        order = torch.full((weight.size(0),), sum(rows))
        begin = 0
        for one, count in zip(self.adapters, rows, strict=True):
            own = next(found for name, found in blocks.items() if name.split(".")[-2] == one.matrix.leaf)
            first = min(piece.hf_at for piece in own)
            assert sum(piece.length for piece in own) == count, f"{one.matrix.module} is not split evenly"
            for piece in own:
                at = begin + piece.hf_at - first
                order[piece.at : piece.at + piece.length] = torch.arange(at, at + piece.length)
            begin += count
        return None if torch.equal(order, torch.arange(begin)) else order.to(weight.device)

    def forward(self, hidden: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What the linear's output `[S, B, outputs]` lacks, from its input `[S, B, inputs]`; computed in `dtype`."""
        low = torch.cat([self._low(hidden, one, dtype) for one in self.adapters], dim=-1)
        return F.linear(self._exchanged(low), self._fused(low.dtype))

    def _low(self, hidden: torch.Tensor, one: Adapter, dtype: torch.dtype | None) -> torch.Tensor:
        inputs = self._whole(f"{one.matrix.leaf}_A")
        if one.dropout > 0 and self.training:
            with self._random():
                hidden = F.dropout(hidden, one.dropout)
        if dtype is not None:
            hidden, inputs = hidden.to(dtype), inputs.to(dtype)
        return F.linear(hidden, inputs) * one.scale

    def _exchanged(self, low: torch.Tensor) -> torch.Tensor:
        """The low-rank product of this rank's tokens or inputs to that which B needs."""
        group, sequence = self.spread.group, self.spread.sequence
        if self.spread.expert is not None or group.size() == 1 or self.split == "whole":
            return low
        if self.split == "rows":
            if sequence:
                return gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=group)
            return copy_to_tensor_model_parallel_region(low, group=group)
        if sequence:
            return reduce_scatter_to_sequence_parallel_region(low, group=group)
        return reduce_from_tensor_model_parallel_region(low, group=group)

    def _whole(self, name: str) -> torch.Tensor:
        """A parameter. The whole ones of an expert that ranks share have seen a part of the gradient: it is summed."""
        parameter = self.get_parameter(name)
        if self.spread.expert is not None and self.spread.group.size() > 1 and name not in self.axes:
            return copy_to_tensor_model_parallel_region(parameter, group=self.spread.group)
        return parameter

    def _fused(self, dtype: torch.dtype) -> torch.Tensor:
        """`[outputs, R]`: every B in its rows and columns, zero elsewhere."""
        total, begin = sum(one.rank for one in self.adapters), 0
        wide: list[torch.Tensor] = []
        for one in self.adapters:
            own = self._whole(f"{one.matrix.leaf}_B").to(dtype)
            wide.append(F.pad(own, (begin, total - begin - one.rank)))
            begin += one.rank
        if self.order is None:
            return torch.cat(wide)
        return torch.cat([*wide, wide[0].new_zeros(1, total)])[self.order]

    def _random(self) -> Any:
        """Random numbers that agree where ranks hold the same inputs, and differ where they hold different ones."""
        if self.spread.expert is not None:
            tracker = get_cuda_rng_tracker()
            assert tracker is not None, "build_model seeds the tracker"
            return tracker.fork(get_expert_parallel_rng_tracker_name())
        return model_parallel_random() if self.spread.sequence or self.split == "columns" else nullcontext()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Every parameter with the ranks that share it, for megatron-core's checkpoints."""
        assert metadata is not None, "saving names the groups"
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, self.axes, sharded_offsets,
            tp_group=self.spread.group, dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip
