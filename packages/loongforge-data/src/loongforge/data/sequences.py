"""Which conversations share a training sequence, in which order sequences come, and how one is filled."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loongforge.core.data.contract import Sample, SourceRequest
from loongforge.core.errors import DataError
from loongforge.data.blend import Blend
from loongforge.data.items import gathered, spans
from loongforge.data.once import build_once
from loongforge.data.pack import Packs
from loongforge.data.permute import Permutation, derive_key

_FORMAT = 2
"""Raised when packs of an earlier version must not be read."""


@dataclass(frozen=True, slots=True)
class Group:
    """The conversations of one corpus."""

    count: int
    packs: Packs | None
    """None: one conversation per sequence."""

    def __len__(self) -> int:
        """Sequences of one epoch."""
        return self.count if self.packs is None else len(self.packs)

    def __getitem__(self, place: int) -> list[int]:
        """Conversations of one sequence."""
        return [place] if self.packs is None else self.packs[place].tolist()

    def many(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many conversations each of several sequences has, and all of them end to end; int64."""
        if self.packs is None:
            return np.ones_like(places), places
        first, last = self.packs.offsets[places], self.packs.offsets[places + 1]
        return last - first, self.packs.items[spans(first, last - first)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A packed corpus, to be told row by row."""

    paths: tuple[str, ...]
    caches: tuple[Path, ...]
    """The folder of conversations of each path."""
    kept: tuple[int, ...]
    """Conversations in each."""
    first: int
    """The first that belongs to the part asked for; the corpus begins there."""
    lengths: np.ndarray
    """int64 `[conversations]`: tokens of each from there on."""
    packs: Packs


class Order:
    """Sample numbers to conversations: corpora by weight, each anew shuffled in every epoch."""

    def __init__(self, request: SourceRequest, groups: Sequence[Group], weights: list[float]) -> None:
        self._request = request
        self._groups = groups
        self._blend = Blend(weights)

    def __getitem__(self, index: int) -> tuple[int, list[int]]:
        """Corpus of sample `index`, and the conversations in it."""
        number, place = self._blend[index]
        group = self._groups[number]
        epoch, place = divmod(place, len(group))
        if self._request.shuffle:
            key = derive_key(self._request.seed, number, epoch)
            place = Permutation(len(group), key).one(place)
        return number, group[place]

    def documents(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Conversations of several samples, int64 `[documents, 2]` of corpus and number, and the place of each one's
        sample among `numbers`, int64 `[documents]`."""
        owners, places = self._blend.many(np.asarray(numbers, dtype=np.int64))

        def of(number: int, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            group = self._groups[number]
            epochs, within = np.divmod(places[which], len(group))
            for epoch in np.unique(epochs).tolist() if self._request.shuffle else ():
                here = epochs == epoch
                within[here] = Permutation(len(group), derive_key(self._request.seed, number, epoch))(within[here])
            counts, chosen = group.many(within)
            return counts, np.stack([np.full_like(chosen, number), chosen], axis=1)

        counts, documents = gathered(owners, of)
        return documents, np.repeat(np.arange(len(counts)), counts)

    @property
    def units(self) -> int:
        """Sequences of one epoch of all corpora."""
        return sum(len(group) for group in self._groups)

    def epochs(self) -> list[float]:
        """How often the samples asked for go through each corpus."""
        drawn = self._blend.drawn(self._request.num_samples)
        return [count / len(group) for count, group in zip(drawn, self._groups, strict=True)]


@dataclass(frozen=True, slots=True)
class Filled:
    """A sequence made of conversations, and where each begins and the last one ends, padding included."""

    sample: Sample
    borders: list[int]


def fill(request: SourceRequest, pad_id: int, said: Sequence[tuple[np.ndarray, np.ndarray]], packed: bool) -> Filled:
    """Conversations, tokens and mask of each, one after the other; position ids count from 0 in each."""
    length = request.seq_length
    tokens = np.full(length, pad_id, dtype=np.int64)
    labels = np.full(length, pad_id, dtype=np.int64)
    loss_mask = np.zeros(length, dtype=np.float32)
    borders = [0]
    for one, mask in said:
        start, size = borders[-1], len(one) - 1
        tokens[start : start + size] = one[:-1]
        labels[start : start + size] = one[1:]
        loss_mask[start : start + size] = mask[1:]
        borders.append(start + (padded(size, request.segment_multiple) if packed else length))
    if borders[-1] < length:
        borders.append(length)
    starts = np.repeat(borders[:-1], np.diff(borders))
    position_ids = np.arange(length, dtype=np.int64) - starts
    sample = Sample(tokens=tokens, labels=labels, loss_mask=loss_mask, position_ids=position_ids)
    if packed:
        sample["cu_seqlens"] = np.array(borders, dtype=np.int32)
    return Filled(sample, borders)


def taken(request: SourceRequest, lengths: np.ndarray) -> np.ndarray:
    """Positions that conversations of `lengths` tokens take, int64: each its own segment, or the whole sequence."""
    if not request.packing:
        return np.full_like(lengths, request.seq_length)
    return padded(lengths - 1, request.segment_multiple)


def plan_packs(lengths: np.ndarray, request: SourceRequest, content: str) -> Packs:
    """Packs of conversations of `lengths` tokens, from the cache when they are there. Collective.

    `content` identifies the conversations.
    """
    decisive = repr((_FORMAT, content, request.seq_length, request.segment_multiple))
    target = request.cache / f"packs-{hashlib.blake2b(decisive.encode(), digest_size=8).hexdigest()}.npz"

    def build() -> None:
        packs = Packs.fit(padded(lengths - 1, request.segment_multiple), request.seq_length)
        content = io.BytesIO()
        np.savez(content, items=packs.items, offsets=packs.offsets)
        temporary = target.with_name(f"{target.name}.writing-{os.getpid()}")
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, target)

    build_once(target, build, is_builder=request.is_builder, barrier=request.barrier)
    try:
        with np.load(target) as stored:
            packs = Packs(stored["items"], stored["offsets"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the cache {target} is damaged ({error}): delete it, it is built again.") from error
    assert len(packs.items) == len(lengths), f"{target} was made for other conversations"
    return packs


def check_packing(request: SourceRequest) -> None:
    """`DataError` when segments of the wanted multiple do not fill a sequence."""
    if request.packing and request.seq_length % request.segment_multiple:
        raise DataError(
            f"packing needs a sequence length that is a multiple of {request.segment_multiple} (tensor and context "
            f"parallel sizes), got {request.seq_length!r}: change --seq-length."
        )


def settings(request: SourceRequest) -> Mapping[str, str]:
    """Facts of the request that samples depend on, for a fingerprint."""
    facts = {"seed": request.seed, "shuffle": request.shuffle, "seq_length": request.seq_length}
    facts |= {"split": request.split, "part": request.part, "packing": request.packing}
    facts |= {"segment_multiple": request.segment_multiple if request.packing else 1}
    return {name: str(value) for name, value in facts.items()}


def padded(size: Any, multiple: int) -> Any:
    """`size`, an int or an array of ints, rounded up to a multiple."""
    return -(-size // multiple) * multiple
