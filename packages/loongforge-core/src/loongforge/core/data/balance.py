"""The samples of an optimizer step dealt to ranks by what they cost, in place of by position.

Every rank deals the whole step by itself, all micro-batches of all ranks, from sizes that the source knows, and then
reads its own part: nothing is exchanged. A step holds the same documents as without; the position of a run stays one
number.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from loongforge.core.data.contract import Contents, Measured
from loongforge.core.errors import DataError

if TYPE_CHECKING:
    from loongforge.core.data.loader import LoaderShape
    from loongforge.core.megatron.groups import World
    from loongforge.core.plan.plan import Plan

CHECK_INTERVAL = 100
"""Steps between two comparisons of the deal over all ranks."""


@dataclass(frozen=True, kw_only=True)
class Deal:
    """Where each document of a step goes."""

    sequences: np.ndarray
    """int64 `[documents]`: `(rank * num_microbatches + micro-batch) * micro_batch_size + row`."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the step's line and `metrics.jsonl` tell about it, by name."""


class Balancer(Protocol):
    """Deals the documents of a step. Made by `BalancerSpec.open` from the run's plan, which says how many ranks,
    micro-batches and rows there are. Equal contents must give equal deals in every process."""

    def __call__(self, contents: Contents) -> Deal:
        """The sequence of every document; those of one together at most `seq_length` long."""
        ...


@dataclass(frozen=True, slots=True)
class Chosen:
    """A sequence to be filled."""

    samples: tuple[int, ...]
    """Numbers of the samples that its documents come from."""
    documents: np.ndarray
    """int64 `[n, k]`, for `Measured.fill`."""


@dataclass(frozen=True, kw_only=True)
class DealtStep:
    """One optimizer step as it was dealt."""

    sequences: Sequence[Chosen]
    """This rank's, micro-batch after micro-batch."""
    numbers: Mapping[str, float]
    digest: int
    """64 bits of all documents and where they go: equal on ranks that agree."""


def dealt(source: Measured, balancer: Balancer, shape: LoaderShape, seq_length: int) -> Iterator[DealtStep]:
    """The whole steps that the source has samples for; `DataError` when the balancer's answer is none."""
    for first in shape.steps(len(source)):
        contents = source.contents(range(first, first + shape.global_batch_size))
        deal = balancer(contents)
        _check(contents, deal, shape, seq_length)
        order = np.argsort(deal.sequences, kind="stable")
        mine = shape.micro_batch_size * shape.num_microbatches
        ends = np.searchsorted(deal.sequences[order], np.arange(shape.dp_rank * mine, (shape.dp_rank + 1) * mine + 1))
        parts = [order[start:end] for start, end in itertools.pairwise(ends)]
        yield DealtStep(
            sequences=[
                Chosen(tuple((first + np.unique(contents.samples[part])).tolist()), contents.documents[part])
                for part in parts
            ],
            numbers=deal.numbers,
            digest=_digest(contents, deal),
        )


def meeting(plan: Plan) -> Literal["step", "micro_batch"]:
    """Where data parallel ranks of this layout wait for each other: in each micro-batch where they share experts, or a
    block of the encoder inside the forward pass, or count tokens of an expert together; else where a step ends."""
    layout, encoder, experts = plan.layout, plan.encoder, plan.geometry.experts
    replica = layout.tp * layout.cp
    counted = experts is not None and experts.balance_coeff > 0 and experts.load_balancing == "global_aux_loss"
    shared = encoder is not None and encoder.mode == "inline" and encoder.tp > replica
    return "micro_batch" if layout.ep * layout.etp > replica or shared or counted else "step"


def require_one_deal(deal: DealtStep | None, world: World, step: int, start: int) -> None:
    """Raise the same `DataError` on all ranks when they have dealt step number `step` unequally.

    Looks at every `CHECK_INTERVAL`-th step from step number `start` on, which is collective; None is by position.
    """
    if deal is None or (step - start) % CHECK_INTERVAL:
        return
    digests = world.gather(deal.digest)
    strangers = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if strangers:
        raise DataError(
            f"data.balance: ranks {strangers[:8]} have dealt the samples of step {step + 1} otherwise than rank 0, so "
            "some would be trained twice and others never: give every node the same files and the same versions of "
            "LoongForge and numpy."
        )


def _check(contents: Contents, deal: Deal, shape: LoaderShape, seq_length: int) -> None:
    count, sequences = len(contents.lengths), deal.sequences
    if len(sequences) != count or (count and not 0 <= sequences.min() <= sequences.max() < shape.global_batch_size):
        raise DataError(
            f"data.balance: the balancer has dealt {len(sequences)} documents to the sequences "
            f"{sequences.min(initial=0)} to {sequences.max(initial=0)}; there are {count} and "
            f"{shape.global_batch_size}. Choose another one, or none."
        )
    filled = np.bincount(sequences, contents.lengths, shape.global_batch_size)
    if count and filled.max() > seq_length:
        raise DataError(
            f"data.balance: the balancer has put {int(filled.max())} positions into a sequence of {seq_length}. "
            "Choose another one, or none."
        )


def _digest(contents: Contents, deal: Deal) -> int:
    content = np.concatenate([contents.documents.reshape(-1), contents.lengths, deal.sequences]).astype("<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
