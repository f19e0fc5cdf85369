"""The parameters of this rank's model chunks, each with its global name, its rule and its place among the ranks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from loongforge.core.checkpoint.contract import WeightPart
from loongforge.core.model.names import whole_model_name
from loongforge.core.model.pieces import Piece, Shape, Shard, hf_shapes, pieces
from loongforge.core.model.weights import Copy, Rule, StackedExperts, hf_names

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of this rank with the rule that moves it."""

    name: str
    """Global name: layers and experts are numbered over the whole model."""
    tensor: torch.Tensor
    rule: Rule
    numbers: Mapping[str, str]
    """What `{layer}`, `{expert}` and others stand for in the rule's Hugging Face names."""
    shard: Shard

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to one expert: spread over expert parallel ranks and split over fewer or more of them."""
        return "expert" in self.numbers

    @property
    def is_stacked(self) -> bool:
        """Whether its Hugging Face tensor holds other experts too."""
        return isinstance(self.rule, StackedExperts)

    @property
    def is_whole(self) -> bool:
        """Whether every rank that shares it holds all of it."""
        rule = self.rule
        split = not isinstance(rule, Copy | StackedExperts) or rule.shard_dim is not None
        return not split and not (isinstance(rule, StackedExperts) and rule.gate_up)

    @property
    def speaks(self) -> bool:
        """Whether this rank is the first one of those that hold a part or a copy of it."""
        return self.shard.rank == 0 and self.shard.copy == 0

    def hf_names(self) -> tuple[str, ...]:
        """Hugging Face tensors behind this parameter."""
        return tuple(self._filled(name) for name in hf_names(self.rule))

    def copies(self) -> dict[str, str]:
        """Tensors that hold one of those once more, each with the name of that one; exports have them too."""
        rule = self.rule
        return {self._filled(name): self._filled(rule.hf) for name in rule.again} if isinstance(rule, Copy) else {}

    def hf_shapes(self) -> dict[str, Shape]:
        """Whole shape of each of them; `ValueError` when the parameter does not fit its rule."""
        shapes = hf_shapes(self.rule, tuple(self.tensor.shape), self.shard)
        return {self._filled(name): shape for name, shape in shapes.items()}

    def pieces(self, rank: int | None = None) -> dict[str, list[Piece]]:
        """Blocks by Hugging Face name: this rank's, or those of another rank among the ones that share it."""
        shard = self.shard if rank is None else replace(self.shard, rank=rank)
        blocks: dict[str, list[Piece]] = {name: [] for name in self.hf_names()}
        for piece in pieces(self.rule, tuple(self.tensor.shape), shard):
            blocks[self._filled(piece.hf)].append(piece)
        return blocks

    def stored_as(self, shapes: Mapping[str, Shape]) -> Parameter:
        """The parameter, or where a file stores stacked experts the other way round, the parameter with that rule.

        The released files of one architecture have one order and what transformers writes again the other; a shape
        that fits both is the rule's.
        """
        if not isinstance(self.rule, StackedExperts) or shapes == self.hf_shapes():
            return self
        turned = replace(self, rule=replace(self.rule, transposed=not self.rule.transposed))
        return turned if turned.hf_shapes() == shapes else self

    def _filled(self, name: str) -> str:
        return _PLACEHOLDER.sub(lambda found: self.numbers[found[1]], name)


def collect(part: WeightPart) -> tuple[list[Parameter], list[str]]:
    """Parameters of a component in model order, and the global names of those that no rule moves.

    A buffer takes part when a rule names it; other buffers are made by the model itself. A rank that holds none of the
    component has no parameters.
    """
    rules = [(_pattern(rule.megatron), rule) for rule in part.table.rules]
    others = [re.compile(pattern) for pattern in part.table.ignored_megatron]
    found: list[Parameter] = []
    orphans: list[str] = []
    for chunk in part.chunks:
        for local, tensor, is_buffer in _tensors(chunk):
            name = whole_model_name(chunk, local)
            if any(pattern.fullmatch(name) for pattern in others):
                continue
            hit = next(((match, rule) for pattern, rule in rules if (match := pattern.fullmatch(name))), None)
            if hit is None:
                orphans += [] if is_buffer else [name]
                continue
            numbers = hit[0].groupdict()
            shard = _shard(part, numbers)
            found.append(Parameter(name=name, tensor=tensor.detach(), rule=hit[1], numbers=numbers, shard=shard))
    return _counted(part, found), orphans


def _shard(part: WeightPart, numbers: Mapping[str, str]) -> Shard:
    groups: Any = part.groups
    assert groups is not None, f"a rank with chunks of the {part.component} has its groups"
    expert = numbers.get("expert")
    split, copies = (groups.tp, groups.dp_cp) if expert is None else (groups.expt_tp, groups.expt_dp)
    return Shard(
        rank=split.rank(),
        size=split.size(),
        vocab_size=part.vocab_size,
        copy=copies.rank(),
        expert=int(expert or 0),
    )


def _counted(part: WeightPart, found: list[Parameter]) -> list[Parameter]:
    """Tell stacked experts how many there are: every expert parallel rank holds as many as this one."""
    here = Counter(parameter.hf_names() for parameter in found if parameter.is_stacked)
    groups: Any = part.groups
    return [
        replace(one, shard=replace(one.shard, experts=here[one.hf_names()] * groups.ep.size()))
        if one.is_stacked
        else one
        for one in found
    ]


def _tensors(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    for name, parameter in chunk.named_parameters():
        yield name, parameter, False
    for name, buffer in chunk.named_buffers():
        yield name, buffer, True


def _pattern(template: str) -> re.Pattern[str]:
    """Every placeholder is a number; one that occurs again is the same number."""
    seen: set[str] = set()
    text = ""
    for position, part in enumerate(_PLACEHOLDER.split(template)):
        if position % 2 == 0:
            text += re.escape(part)
        else:
            text += f"(?P={part})" if part in seen else rf"(?P<{part}>\d+)"
            seen.add(part)
    return re.compile(text)
