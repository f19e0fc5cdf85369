"""What a weight rule means for one parameter on one tensor parallel rank: which block equals which block.

Loading copies every piece from the Hugging Face tensor into the parameter, saving copies it back. One description for
both directions, so one cannot be wrong without the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from loongforge.core.model.weights import (
    Copy,
    FuseDelta,
    FuseGateUp,
    FuseQKV,
    Rule,
    SplitDelta,
    SplitQKV,
    StackedExperts,
)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`parameter.narrow(dim, at, length)` equals `tensor[hf].narrow(dim, hf_at, length)`.

    Of a tensor that stacks experts, `index` says which of its matrices stands in place of `tensor[hf]`, and
    `transposed` that it is stored the other way round.
    """

    hf: str
    dim: int
    at: int
    hf_at: int
    length: int
    index: int | None = None
    transposed: bool = False
    rows: slice = slice(None)
    """Rows of the Hugging Face tensor that this rank has, where the piece is cut along another dimension."""

    def of_parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece as a view of the parameter."""
        return tensor.narrow(self.dim, self.at, self.length)

    @property
    def block(self) -> tuple[slice, ...]:
        """Where the piece is in the Hugging Face tensor, dimension by dimension; those behind are whole."""
        stretch = slice(self.hf_at, self.hf_at + self.length)
        if self.index is None:
            before = (self.rows,) + (slice(None),) * (self.dim - 1) if self.dim else ()
            return (*before, stretch)
        place = 1 - self.dim if self.transposed else self.dim
        return (slice(self.index, self.index + 1), *(slice(None),) * place, stretch)

    def of_hf(self, tensor: Any) -> torch.Tensor:
        """The piece out of the Hugging Face tensor, a view of it; a slice of a file that is not read yet is read."""
        found: torch.Tensor = tensor[self.block]
        if self.index is not None:
            found = found[0]
        return found.mT if self.transposed else found

    def as_hf(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece as a view of the parameter, in the shape of its block."""
        found = self.of_parameter(tensor)
        found = found.mT if self.transposed else found
        return found if self.index is None else found[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Which part of a parameter this is, and which copy of that part."""

    rank: int
    """Rank among those that share the parameter."""
    size: int
    """How many these are."""
    vocab_size: int
    """Rows of vocabulary tensors without padding."""
    copy: int = 0
    """Number among equal copies; the first one speaks and writes."""
    expert: int = 0
    """Number of the expert over the whole model, when the parameter is an expert's."""
    experts: int = 0
    """Experts of a stacked tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What each group takes of a tensor: `length` rows from `begin` on, the next group's `step` further."""

    hf: str
    length: int
    step: int
    begin: int = 0


def hf_shapes(rule: Rule, local: Shape, shard: Shard) -> dict[str, Shape]:
    """Whole shape of every Hugging Face tensor behind a parameter whose shape on this rank is `local`.

    Raises `ValueError` when the parameter cannot have that shape under the rule.
    """
    match rule:
        case Copy():
            return {rule.hf: _whole(rule, local, shard)}
        case FuseQKV():
            heads, groups, width = rule.num_attention_heads, rule.num_query_groups, rule.kv_channels
            heads *= 2 if rule.gated else 1
            if local[0] * shard.size != (heads + 2 * groups) * width:
                raise ValueError(
                    f"{local[0]} rows on each of {shard.size} ranks are not {heads} + 2 x {groups} heads of {width}"
                )
            kv = (groups * width, *local[1:])
            return {rule.q: (heads * width, *local[1:]), rule.k: kv, rule.v: kv}
        case FuseGateUp():
            half = (_half(local) * shard.size, *local[1:])
            return {rule.gate: half, rule.up: half}
        case SplitQKV():
            heads, width = rule.num_attention_heads, rule.kv_channels
            if local[0] * shard.size != 3 * heads * width:
                raise ValueError(f"{local[0]} rows on each of {shard.size} ranks are not 3 x {heads} heads of {width}")
            return {rule.hf: (3 * heads * width, *local[1:])}
        case FuseDelta() | SplitDelta():
            return _delta_shapes(rule, local, shard)
        case StackedExperts():
            return {rule.hf: _stacked_shape(rule, local, shard)}


def pieces(rule: Rule, local: Shape, shard: Shard) -> Iterator[Piece]:
    """All blocks of this rank's parameter, in its own order. Rows of padding belong to no piece."""
    match rule:
        case Copy():
            yield from _copied(rule, local, shard)
        case FuseQKV():
            yield from _interleaved(_group_rows(rule), rule.num_query_groups, local[0], shard)
        case FuseGateUp():
            half = local[0] // 2
            yield Piece(hf=rule.gate, dim=0, at=0, hf_at=shard.rank * half, length=half)
            yield Piece(hf=rule.up, dim=0, at=half, hf_at=shard.rank * half, length=half)
        case SplitQKV():
            heads, width = rule.num_attention_heads, rule.kv_channels
            rows = [Rows(hf=rule.hf, length=width, step=width, begin=part * heads * width) for part in range(3)]
            yield from _interleaved(rows, heads, local[0], shard)
        case FuseDelta() | SplitDelta():
            yield from _interleaved(_key_head_rows(rule), rule.num_key_heads, local[0], shard)
        case StackedExperts():
            yield from _stacked(rule, local, shard)


def _half(local: Shape) -> int:
    if local[0] % 2:
        raise ValueError(f"{local[0]} rows have no two halves")
    return local[0] // 2


def _whole(rule: Copy, local: Shape, shard: Shard) -> Shape:
    if rule.shard_dim is None:
        return local
    full = list(local)
    full[rule.shard_dim] *= shard.size
    if rule.vocab:
        if full[rule.shard_dim] < shard.vocab_size:
            raise ValueError(f"{full[rule.shard_dim]} rows over all ranks cannot hold {shard.vocab_size} tokens")
        full[rule.shard_dim] = shard.vocab_size
    return tuple(full)


def _copied(rule: Copy, local: Shape, shard: Shard) -> Iterator[Piece]:
    length = local[rule.shard_dim or 0]
    start = 0 if rule.shard_dim is None else shard.rank * length
    if rule.halves_exchanged:
        half, rows = local[1] // 2, slice(start, start + length)
        for at, hf_at in ((0, half), (half, 0)):
            yield Piece(hf=rule.hf, dim=1, at=at, hf_at=hf_at, length=half, rows=rows)
        return
    if rule.shard_dim is None:
        yield Piece(hf=rule.hf, dim=0, at=0, hf_at=0, length=length)
        return
    if rule.vocab:
        length = min(length, shard.vocab_size - start)
    if length > 0:
        yield Piece(hf=rule.hf, dim=rule.shard_dim, at=0, hf_at=start, length=length)


def _group_rows(rule: FuseQKV) -> list[Rows]:
    width, heads = rule.kv_channels, rule.num_attention_heads // rule.num_query_groups
    key_value = [Rows(hf=name, length=width, step=width) for name in (rule.k, rule.v)]
    if not rule.gated:
        return [Rows(hf=rule.q, length=heads * width, step=heads * width), *key_value]
    step = 2 * heads * width
    begins = [2 * head * width + half for half in (0, width) for head in range(heads)]
    return [*(Rows(hf=rule.q, length=width, step=step, begin=begin) for begin in begins), *key_value]


def _key_head_rows(rule: FuseDelta | SplitDelta) -> list[Rows]:
    key, keys = rule.key_head_dim, rule.key_head_dim * rule.num_key_heads
    repeats = rule.num_value_heads // rule.num_key_heads
    values = repeats * rule.value_head_dim
    if isinstance(rule, SplitDelta):
        both = [Rows(hf=rule.hf, length=key, step=key, begin=begin) for begin in (0, keys)]
        return [*both, Rows(hf=rule.hf, length=values, step=values, begin=2 * keys)]
    return [
        Rows(hf=rule.qkvz, length=2 * (key + values), step=2 * (key + values)),
        Rows(hf=rule.ba, length=2 * repeats, step=2 * repeats),
    ]


def _delta_shapes(rule: FuseDelta | SplitDelta, local: Shape, shard: Shard) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for rows in _key_head_rows(rule):
        whole, *rest = shapes.get(rows.hf, (0, *local[1:]))
        shapes[rows.hf] = (whole + rows.length * rule.num_key_heads, *rest)
    expected = sum(shape[0] for shape in shapes.values())
    if local[0] * shard.size != expected:
        raise ValueError(
            f"{local[0]} rows on each of {shard.size} ranks are not the {expected} of {rule.num_key_heads} key heads "
            f"of {rule.key_head_dim} and {rule.num_value_heads} value heads of {rule.value_head_dim}"
        )
    return shapes


def _interleaved(parts: list[Rows], groups: int, rows: int, shard: Shard) -> Iterator[Piece]:
    """Rows of all parts, group after group, cut at this rank's share.

    The share may begin or end inside a group, when ranks are more than groups.
    """
    start, stop, row = shard.rank * rows, (shard.rank + 1) * rows, 0
    for group in range(groups):
        for part in parts:
            low, high = max(row, start), min(row + part.length, stop)
            if low < high:
                place = part.begin + group * part.step + low - row
                yield Piece(hf=part.hf, dim=0, at=low - start, hf_at=place, length=high - low)
            row += part.length


def _stacked_shape(rule: StackedExperts, local: Shape, shard: Shard) -> Shape:
    if len(local) != 2:
        raise ValueError(f"an expert's matrix has two dimensions, not {len(local)}")
    block = list(local)
    if rule.gate_up:
        block[0] = 2 * _half(local) * shard.size
    elif rule.shard_dim is not None:
        block[rule.shard_dim] *= shard.size
    return (shard.experts, *(reversed(block) if rule.transposed else block))


def _stacked(rule: StackedExperts, local: Shape, shard: Shard) -> Iterator[Piece]:
    def piece(dim: int, at: int, hf_at: int, length: int) -> Piece:
        return Piece(
            hf=rule.hf, dim=dim, at=at, hf_at=hf_at, length=length, index=shard.expert, transposed=rule.transposed
        )

    if rule.gate_up:
        half = local[0] // 2
        yield piece(0, 0, shard.rank * half, half)
        yield piece(0, half, (shard.size + shard.rank) * half, half)
    else:
        dim = rule.shard_dim or 0
        yield piece(dim, 0, 0 if rule.shard_dim is None else shard.rank * local[dim], local[dim])
